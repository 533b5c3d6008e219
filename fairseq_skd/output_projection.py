"""Find the matrix that turns a fairseq decoder's features into logits, and how far to trust it."""

import inspect
from typing import Any, Mapping, NamedTuple, Optional

from fairseq.models import BaseFairseqModel, FairseqDecoder, FairseqLanguageModel
from fairseq.models.transformer import TransformerDecoderBase, TransformerModelBase
from torch import Tensor, nn

from fairseq_skd.compatibility import unwrap

__all__ = ["OutputProjection", "UnsupportedModelError", "check_inputs", "find_output_projection"]


class UnsupportedModelError(RuntimeError):
    """The model has no output projection that self-distillation could read."""


class OutputProjection(NamedTuple):
    """The output projection of a model.

    Attributes
    ----------
    weight : Tensor
        W, V x d: one row a word of the dictionary. The parameter itself; under weight
        normalisation (convolutional decoders) what the last forward pass made of it.
    dictionary : Dictionary
        Whose words these are: the decoder's own, since a task with several languages may have
        another one for each. The task's where the decoder does not tell.
    owner : object
        Stays the same for as long as the projection does: the parameter, or the decoder that
        makes it.
    plain_softmax : bool
        The model's log-probabilities are fairseq's own: a log-softmax of its output, so that the
        loss can be computed from logits.
    features_suffice : bool
        The logits are ``features @ W.t()`` and nothing else, and the model's forward returns the
        features if asked (``features_only=True``), so that projection and loss can be computed
        together.
    """

    weight: Tensor
    dictionary: Any
    owner: Any
    plain_softmax: bool
    features_suffice: bool


def find_output_projection(model: Any, dictionary: Any) -> OutputProjection:
    """Find the output projection of a fairseq model, through wrappers for distributed training.

    Parameters
    ----------
    model : Module
        With a Transformer, LSTM, convolutional or lightweight convolutional decoder, tied or not
        (or any decoder that keeps its table under one of their names).
    dictionary : Dictionary
        The task's target dictionary, for a decoder that does not know its own.

    Raises
    ------
    UnsupportedModelError
        If there is no single table (adaptive softmax), none is found, or its rows are not the
        words of the dictionary.
    """
    inner = unwrap(model)
    decoder = getattr(inner, "decoder", None)
    if decoder is None:
        raise _unsupported(inner, "it has no decoder")
    if getattr(decoder, "adaptive_softmax", None) is not None:
        raise _unsupported(
            inner,
            "adaptive softmax keeps the words in several tables of different widths, so there is "
            "no distance between two words. Train without --adaptive-softmax-cutoff; of the "
            "language models choose --arch transformer_lm, not transformer_lm_wiki103 or "
            "transformer_lm_gbw, which set it. The loss over the full vocabulary is computed in "
            "blocks, so that it needs little memory",
        )
    weight = _weight(decoder)
    if weight is None:
        raise _unsupported(inner, f"its {type(decoder).__name__} has no output table that I know")
    dictionary = getattr(decoder, "dictionary", None) or dictionary
    if weight.dim() != 2 or weight.size(0) != len(dictionary):
        raise _unsupported(
            inner,
            f"its output projection has shape {tuple(weight.shape)}, but the decoder's dictionary "
            f"has {len(dictionary)} words: one row a word is needed",
        )
    plain = _plain_softmax(inner, decoder)
    owner = weight if isinstance(weight, nn.Parameter) else decoder
    suffices = plain and _features_suffice(model, inner, decoder)
    return OutputProjection(weight, dictionary, owner, plain, suffices)


def check_inputs(model: Any, net_input: Mapping[str, Any]) -> None:
    """Refuse a model whose forward pass needs what no batch of its task has.

    Non-autoregressive ones need the noisy target, and come with a criterion of their own.

    Raises
    ------
    UnsupportedModelError
        With the names of what is missing.
    """
    inner = unwrap(model)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [
        name
        for name, parameter in inspect.signature(inner.forward).parameters.items()
        if parameter.kind in named and parameter.default is parameter.empty
        if name not in net_input
    ]
    if missing:
        raise _unsupported(
            inner,
            f"its forward pass needs {', '.join(missing)}, which is not in a batch: it is trained "
            "with a criterion of its own (of non-autoregressive models nat_loss)",
        )


def _weight(decoder: Any) -> Optional[Tensor]:
    for name in ("output_projection", "fc_out", "fc3"):  # Transformer and lightconv, LSTM, conv
        weight = getattr(getattr(decoder, name, None), "weight", None)
        if weight is not None:
            return weight
    if getattr(decoder, "share_input_output_embed", False):  # a tied LSTM has no layer for it
        return getattr(getattr(decoder, "embed_tokens", None), "weight", None)
    return None


def _plain_softmax(model: Any, decoder: Any) -> bool:
    return (
        _is(model, "get_normalized_probs", BaseFairseqModel, TransformerModelBase)
        and _is(model, "get_normalized_probs_scriptable", BaseFairseqModel)
        and _is(decoder, "get_normalized_probs", FairseqDecoder)
        and _is(decoder, "get_normalized_probs_scriptable", FairseqDecoder)
    )


def _features_suffice(wrapped: Any, model: Any, decoder: Any) -> bool:
    if not (
        _is(model, "forward", TransformerModelBase, FairseqLanguageModel)
        and _is(decoder, "forward", TransformerDecoderBase)
        and _is(decoder, "output_layer", TransformerDecoderBase)
    ):
        return False
    layer = decoder.output_projection
    hooks = (layer._forward_hooks, layer._forward_pre_hooks)  # quantisation noise is one
    if type(layer) is not nn.Linear or layer.bias is not None or any(hooks):
        return False
    # Looking for parameters that no gradient reaches, DDP walks back from the model's outputs. It
    # would not find a projection that is applied after them.
    while wrapped is not model:
        if getattr(wrapped, "find_unused_parameters", False):
            return False
        wrapped = wrapped.module
    return True


def _is(module: Any, method: str, *owners: type) -> bool:
    """Whether a module's method is the one that one of these classes defines."""
    own: Any = getattr(type(module), method, None)
    return method not in vars(module) and any(own is getattr(o, method) for o in owners)


def _unsupported(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"self_kd cannot train {type(model).__name__}: {reason}. Models that work: Transformer, "
        "LSTM, convolutional and lightweight convolutional translation and language models with "
        "one output projection."
    )
