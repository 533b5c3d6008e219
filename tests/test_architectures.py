"""Every kind of model that fairseq registers: trained and equal to the reference, or refused.

docs/reliability.md has the table. Not tried: what needs other software, pretrained weights or
another kind of target.
"""

import re
from types import SimpleNamespace

import pytest
import torch
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, MODEL_REGISTRY

from fairseq_skd.output_projection import UnsupportedModelError
from tests.conftest import ROOT, TINY
from tests.test_criterion import (
    CONV,
    LANGUAGE_MODELS,
    LIGHT,
    MODELS,
    NOW,
    SELF_KD,
    assert_same_gradients,
    by_definition,
)

LEV = ["--task", "translation_lev", "--noise", "full_mask", "--share-all-embeddings"]
ENCODER = ["--encoder-layers", 1, "--encoder-embed-dim", 16, "--encoder-ffn-embed-dim", 16]
ENCODER += ["--encoder-attention-heads", 2]
MASKED = ["--task", "masked_lm", "--tokens-per-sample", 12]
SELF_ATTENTION = ["--decoder-attention", "True", "--self-attention", "False"]
TRAINED = {
    "transformer": (MODELS["transformer"], False),
    "transformer_align": (["--arch", "transformer_align", *TINY, "--alignment-layer", 0], False),
    "bart": (["--arch", "bart_base", *TINY, "--share-all-embeddings"], False),
    "lstm": (MODELS["lstm"], False),
    "fconv": (MODELS["convolutional"], False),
    "fconv_self_att": (["--arch", "fconv_self_att", *CONV, *SELF_ATTENTION], False),
    "lightconv": (["--arch", "lightconv", *TINY, *LIGHT], False),
    "transformer_lm": (LANGUAGE_MODELS["transformer_lm"], True),
    "lstm_lm": (LANGUAGE_MODELS["lstm_lm"], True),
    "fconv_lm": (LANGUAGE_MODELS["fconv_lm"], True),
}
NON_AUTOREGRESSIVE = [
    *("nonautoregressive_transformer", "cmlm_transformer", "insertion_transformer"),
    *("iterative_nonautoregressive_transformer", "levenshtein_transformer", "nacrf_transformer"),
]
REFUSED = {
    **{
        name: (["--arch", name, *TINY, *LEV], "joined", "forward pass needs tgt_tokens")
        for name in NON_AUTOREGRESSIVE
    },
    "roberta": (["--arch", "roberta_base", *ENCODER, *MASKED], "lm", "it has no decoder"),
    "masked_lm": (["--arch", "masked_lm", *ENCODER, *MASKED], "lm", "it has no decoder"),
}
SPEECH = ["s2t_transformer", "s2t_conformer", "s2t_berard", "convtransformer"]
# In other tests: test_tasks.py.
ELSEWHERE = ["multilingual_transformer"]


@pytest.mark.parametrize("name", list(TRAINED))
def test_trained_on_the_defined_loss(build, train_step, name):
    options, lm = TRAINED[name]
    data = "joined" if "--share-all-embeddings" in options else "pair"
    built = build(*options, *SELF_KD, *NOW, "--self-kd-weight", 0.3, lm=lm, data=data)
    assert ARCH_MODEL_REGISTRY[options[1]] is MODEL_REGISTRY[name]
    sample = built.samples[0]
    eligible = None
    ours = train_step(built, sample)
    if data == "joined":
        (taught,) = built.criterion.source.taught.values()
        eligible = taught.teacher.eligible.tolist()
    loss, _, kd, _, gradients = by_definition(built, sample, 0.3, eligible=eligible)
    assert ours.loss.item() == pytest.approx(loss, rel=1e-5)
    assert ours.log["self_kd_loss"].item() == pytest.approx(kd, rel=1e-5)
    assert_same_gradients(ours.gradients, gradients)


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_with_a_sentence_that_says_which_work(build, name):
    options, data, reason = REFUSED[name]
    built = build(*options, *SELF_KD, *NOW, data=data)
    built.criterion.begin_update(0)
    with pytest.raises(UnsupportedModelError, match=reason) as refusal:
        built.criterion(built.model.train(), built.samples[0])
    assert "Models that work: Transformer, LSTM, convolutional" in str(refusal.value)


@pytest.mark.parametrize("name", SPEECH)
def test_speech_to_text(build, train_step, name):
    """Sounds in, words out; the task is a stand-in, since its data sets need audio files."""
    text = build(*MODELS["transformer"], *SELF_KD, *NOW, "--self-kd-weight", 0.3)
    arguments = SimpleNamespace(
        input_feat_per_channel=20,
        input_channels=1,
        conv_channels=16,
        encoder_embed_dim=16,
        encoder_ffn_embed_dim=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        decoder_embed_dim=16,
        decoder_ffn_embed_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        depthwise_conv_kernel_size=3,
        decoder_hidden_dim=16,
        decoder_num_layers=1,
        output_layer_dim=16,
        input_layers="[16]",
        conv_layers="[(4, 3, 2)]",
        num_blstm_layers=1,
        lstm_size=8,
        attention_dim=8,
        dropout=0.0,
        fp16=False,
        max_source_positions=500,
        max_target_positions=50,
    )
    ARCH_CONFIG_REGISTRY[name](arguments)
    dictionary = text.task.target_dictionary
    data = SimpleNamespace(
        share_src_and_tgt=False, prepend_tgt_lang_tag_as_bos=False, pre_tokenizer=None
    )
    task = SimpleNamespace(
        target_dictionary=dictionary,
        source_dictionary=None,
        tgt_dict=dictionary,
        speaker_to_id=None,
        data_cfg=data,
    )
    torch.manual_seed(1)
    text.model = ARCH_MODEL_REGISTRY[name].build_model(arguments, task)
    for module in text.model.modules():  # the noise of dropout has no second writing
        if isinstance(module, torch.nn.Dropout) or hasattr(module, "p"):
            module.p = 0.0
    sample = text.samples[0]
    count = len(sample["target"])
    inputs = {
        "src_tokens": torch.randn(count, 60, 20),
        "src_lengths": torch.full((count,), 60),
        "prev_output_tokens": sample["net_input"]["prev_output_tokens"],
    }
    sample = {**sample, "net_input": inputs}
    text.model.train()
    for module in text.model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    ours = train_step(text, sample)
    loss, _, _, _, gradients = by_definition(text, sample, 0.3)
    assert ours.loss.item() == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(ours.gradients, gradients)


def test_the_page_names_every_model():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = page[page.index("## Every architecture") :].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert set(MODEL_REGISTRY) - named == set()
    for name in [*TRAINED, *REFUSED, *SPEECH, *ELSEWHERE]:
        assert name in named
