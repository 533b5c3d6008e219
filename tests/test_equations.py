"""Every equation against values worked out by hand, and the properties that must always hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_skd import (
    Neighbors,
    SelfTeacher,
    automatic_sigma,
    nearest_neighbors,
    reference_loss,
    self_kd_weight,
    soft_target,
)
from fairseq_skd.options import SelfKDOptions
from fairseq_skd.schedule import TrainingLength
from fairseq_skd.soft_targets import CANDIDATES
from fairseq_skd.sources import SOURCES

# Five words on a line, at 0, 1, 3, 3.5 and 10.
LINE = torch.tensor([[0.0], [1.0], [3.0], [3.5], [10.0]])


class TestSchedule:
    def test_by_hand(self):
        values = [self_kd_weight(u, 0.8, start_update=10, ramp_updates=4) for u in range(9, 17)]
        assert values == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])

    def test_without_a_ramp_it_starts_at_once(self):
        assert [self_kd_weight(u, 0.8, start_update=3) for u in (2, 3, 4)] == [0, 0.8, 0.8]
        assert self_kd_weight(0, 0.8) == 0.8

    @pytest.mark.parametrize(
        ("candidates", "updates", "warmup", "expected", "of_a_language_model"),
        [
            ("past", 6000, 500, (0, 6000), (0, 6000)),
            ("neighbors", 6000, 500, (3000, 3000), (1500, 500)),
            ("prediction", 6000, 2000, (3000, 3000), (2000, 500)),
            ("both", 1007, 0, (503, 504), (251, 83)),  # whole updates
            ("neighbors", 600, 1000, (1000, 0), (1000, 50)),
            ("past", None, 500, (1000, 1000), (1000, 1000)),
            ("stored", 6000, 500, (0, 0), (0, 0)),
        ],
    )
    def test_derived_from_the_length(
        self, candidates, updates, warmup, expected, of_a_language_model
    ):
        source = SOURCES[candidates](SelfKDOptions(), None)
        assert source.schedule(TrainingLength(updates, warmup, "somewhere")) == expected
        length = TrainingLength(updates, warmup, "somewhere", language_model=True)
        assert source.schedule(length) == of_a_language_model
        assert source.schedule(None) == ((0, 0) if candidates == "stored" else (1000, 1000))


class TestNeighborsByHand:
    def test_ids_and_distances(self):
        ids, distances = nearest_neighbors(LINE, 2)
        assert ids.tolist() == [[1, 2], [0, 2], [3, 1], [2, 1], [3, 2]]
        expected = [[1, 3], [1, 2], [0.5, 2], [0.5, 2.5], [6.5, 7]]
        assert torch.allclose(distances, torch.tensor(expected))

    def test_only_eligible_words_are_neighbors_but_every_word_has_some(self):
        ids, _ = nearest_neighbors(LINE, 2, torch.tensor([0, 3, 4]))
        assert ids.tolist() == [[3, 4], [0, 3], [3, 0], [0, 4], [3, 0]]

    def test_cosine_sees_direction_alone(self):
        words = torch.tensor([[1.0, 0.0], [100.0, 1.0], [0.9, 0.9], [0.0, 3.0]])
        ids, distances = nearest_neighbors(words, 1, similarity="cosine")
        assert ids.flatten().tolist() == [1, 0, 1, 2]
        assert distances[2].item() == pytest.approx(math.sqrt(2 - 2 * (101 / math.sqrt(2 * 10001))))

    def test_automatic_sigma_is_the_mean_distance_of_eligible_words(self):
        table = Neighbors(
            torch.zeros(3, 2, dtype=torch.long), torch.tensor([[1.0, 2], [3, 4], [50, 60]])
        )
        assert automatic_sigma(table, torch.tensor([0, 1]), scale=2.0).item() == 5.0
        assert automatic_sigma(table).item() == pytest.approx(20.0)
        assert automatic_sigma(table, scale=0.01).item() == pytest.approx(0.2)


class TestSoftTargetByHand:
    def test_below_the_cap_masses_are_affinities(self):
        soft = soft_target(
            torch.tensor([4]), torch.tensor([[2, 0]]), torch.tensor([[2.0, 4.0]]), sigma=2.0
        )
        a, b = math.exp(-1), math.exp(-4)
        assert soft.ids.tolist() == [[4, 2, 0]]
        assert soft.weights.flatten().tolist() == pytest.approx([1 - a - b, a, b])
        assert 1 - soft.weights[0, 0].item() == pytest.approx(a + b)

    def test_at_the_cap_masses_are_proportional(self):
        soft = soft_target(
            torch.tensor([0]), torch.tensor([[1, 2]]), torch.tensor([[0.0, 1.0]]), 1.0, 0.3
        )
        total = 1 + math.exp(-1)
        expected = [0.7, 0.3 / total, 0.3 * math.exp(-1) / total]
        assert soft.weights.flatten().tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("distance", [0.1, 0.7, 1.5, 4.0])
    def test_one_candidate_gets_the_papers_two_word_rule(self, distance):
        soft = soft_target(
            torch.tensor([0]), torch.tensor([[1]]), torch.tensor([[distance]]), sigma=1.2
        )
        q = min(0.5, math.exp(-(distance**2) / 1.2**2))
        assert soft.weights.flatten().tolist() == pytest.approx([1 - q, q])

    def test_words_out_of_reach_get_nothing_and_no_nan(self):
        far = torch.tensor([[1e20, float("inf")]])
        soft = soft_target(torch.tensor([0]), torch.tensor([[1, 2]]), far, sigma=1e-3)
        assert soft.weights.tolist() == [[1.0, 0.0, 0.0]]


class TestTeacher:
    @pytest.mark.parametrize("similarity", ["euclidean", "cosine"])
    def test_neighbors_by_their_parts(self, similarity):
        """Each setting reaches the function that it is for."""
        words = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
        eligible, target = torch.arange(4, 20), torch.arange(30)
        teacher = SelfTeacher(
            "neighbors", 3, similarity, sigma_scale=0.7, max_mass=0.4, eligible=eligible
        )
        teacher.refresh(words)
        ours = teacher.soft_target(target)
        table = nearest_neighbors(words, 3, eligible, similarity)
        sigma = automatic_sigma(table, eligible, 0.7)
        expected = soft_target(target, *table, sigma, 0.4)
        assert ours.ids.equal(expected.ids)
        assert ours.weights.equal(expected.weights)

    def test_prediction(self):
        teacher = SelfTeacher(
            "prediction", 10, "euclidean", 1.0, max_mass=1.0, eligible=torch.tensor([0, 1, 2])
        )
        teacher.refresh(LINE)
        # predicted: another word, the target itself, a word that is not eligible
        target, prediction = torch.tensor([2, 2, 2]), torch.tensor([1, 2, 3])
        soft = teacher.soft_target(target, prediction, LINE)
        assert soft.weights[:, 1:].sum(1).tolist() == pytest.approx([math.exp(-4), 0, 0])
        assert soft.weights.shape == (3, 2)

    def test_both_is_the_union(self):
        teacher = SelfTeacher("both", 1, "euclidean", 1.0, max_mass=1.0)
        teacher.refresh(LINE)
        # predicted: a new word, the neighbor, the target
        target, prediction = torch.tensor([1, 1, 1]), torch.tensor([2, 0, 1])
        soft = teacher.soft_target(target, prediction, LINE)
        e1, e4 = math.exp(-1), math.exp(-4)
        expected = [[1 - e1 - e4, e1, e4], [1 - e1, e1, 0], [1 - e1, e1, 0]]
        assert torch.allclose(soft.weights, torch.tensor(expected))

    def test_cosine_sees_the_direction_of_a_prediction_alone(self):
        words = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.0, 3.0]])
        teacher = SelfTeacher("prediction", 10, "cosine", 1.0, max_mass=1.0)
        teacher.refresh(words)
        soft = teacher.soft_target(torch.tensor([0, 1]), torch.tensor([1, 2]), words)
        expected = math.exp(-(2 - math.sqrt(2)))  # 45 degrees, twice
        assert soft.weights[:, 1:].sum(1).tolist() == pytest.approx([expected] * 2)

    def test_the_distance_to_a_prediction_is_that_of_the_current_weights(self):
        teacher = SelfTeacher("prediction", 10, "euclidean", 1.0, max_mass=1.0)
        teacher.refresh(LINE)
        soft = teacher.soft_target(torch.tensor([0]), torch.tensor([1]), 2 * LINE)
        assert soft.weights[0, 1:].sum().item() == pytest.approx(math.exp(-4))

    def test_the_table_stays_until_it_is_refreshed(self):
        teacher = SelfTeacher(top_k=1, similarity="euclidean", sigma=1.0)
        words = LINE.clone()
        teacher.refresh(words)
        before = teacher.soft_target(torch.tensor([0]))
        words[4] = 0.1
        assert teacher.soft_target(torch.tensor([0])).ids.equal(before.ids)
        teacher.refresh(words)
        assert teacher.soft_target(torch.tensor([0])).ids.tolist() == [[0, 4]]

    def test_no_gradient_reaches_the_embedding(self):
        words = LINE.clone().requires_grad_()
        for candidates in CANDIDATES:
            teacher = SelfTeacher(candidates, top_k=2)
            teacher.refresh(words)
            soft = teacher.soft_target(torch.tensor([0]), torch.tensor([3]), words)
            assert not soft.weights.requires_grad

    @pytest.mark.parametrize("candidates", ["neighbors", "both"])
    def test_the_neighbors_of_some_words_alone(self, candidates):
        words, target = torch.tensor([3, 0]), torch.tensor([0, 3])
        some, every = (SelfTeacher(candidates, 2, "euclidean", 1.0) for _ in range(2))
        some.refresh(LINE, words)
        every.refresh(LINE)
        prediction = torch.tensor([3, 3])
        ours, expected = (t.soft_target(target, prediction, LINE) for t in (some, every))
        assert ours.ids.equal(expected.ids)
        assert ours.weights.equal(expected.weights)
        with pytest.raises(ValueError, match=r"^with the neighbours of some words .* a number$"):
            SelfTeacher(candidates).refresh(LINE, words)

    def test_bad_candidates_and_the_defaults(self):
        with pytest.raises(ValueError, match=r"^candidates is 'past'; allowed: neighbors, pred"):
            SelfTeacher("past")
        defaults = SelfTeacher()
        assert (defaults.top_k, defaults.sigma_scale, defaults.max_mass) == (10, 0.5, 0.5)

    def test_use_without_what_it_needs(self):
        with pytest.raises(RuntimeError, match=r"^call refresh\(embedding\) before soft_target$"):
            SelfTeacher().soft_target(torch.tensor([0]))
        teacher = SelfTeacher("both", top_k=1)
        teacher.refresh(LINE)
        for some in ((), (torch.tensor([1]),), (None, LINE)):
            with pytest.raises(ValueError, match="need prediction and embedding"):
                teacher.soft_target(torch.tensor([0]), *some)


class TestReferenceLossByHand:
    LPROBS = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64))

    def test_label_smoothing_is_epsilon_over_v_minus_1_off_the_target(self):
        loss = reference_loss(self.LPROBS, torch.tensor([1]), label_smoothing=0.3).loss.item()
        expected = -(0.7 * math.log(0.2) + 0.1 * (math.log(0.1) + math.log(0.3) + math.log(0.4)))
        assert loss == pytest.approx(expected)

    def test_by_itself_it_is_the_cross_entropy(self):
        losses = reference_loss(self.LPROBS, torch.tensor([1]))
        assert losses.loss.item() == pytest.approx(-math.log(0.2))
        soft = soft_target(torch.tensor([1]), torch.tensor([[3]]), torch.tensor([[1.0]]), sigma=1.0)
        assert reference_loss(self.LPROBS, torch.tensor([1]), soft).loss.equal(losses.loss)

    def test_the_mixture(self):
        soft = soft_target(torch.tensor([1]), torch.tensor([[3]]), torch.tensor([[1.0]]), sigma=1.0)
        losses = reference_loss(self.LPROBS, torch.tensor([1]), soft, 0.0, weight=0.25)
        q = math.exp(-1)
        kd = -((1 - q) * math.log(0.2) + q * math.log(0.4))
        assert losses.self_kd_loss.item() == pytest.approx(kd)
        assert losses.loss.item() == pytest.approx(0.75 * -math.log(0.2) + 0.25 * kd)
        assert losses.nll_loss.item() == pytest.approx(-math.log(0.2))


@st.composite
def worlds(draw):
    """A vocabulary with eligible words, targets and predictions."""
    num_words = draw(st.integers(4, 40))
    dim = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    # Rounded, so that equal distances and equal words occur.
    words = (torch.randn(num_words, dim, generator=generator) * 3).round() / 2
    num_eligible = draw(st.integers(2, num_words))
    eligible = torch.randperm(num_words, generator=generator)[:num_eligible].sort().values
    k = draw(st.integers(1, num_eligible - 1))
    target = torch.randint(num_words, (9,), generator=generator)
    prediction = torch.randint(num_words, (9,), generator=generator)
    return words, eligible, k, target, prediction


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    world=worlds(),
    candidates=st.sampled_from(CANDIDATES),
    similarity=st.sampled_from(["euclidean", "cosine"]),
    max_mass=st.floats(0, 1),
    sigma=st.one_of(st.none(), st.floats(1e-3, 1e3)),
)
def test_properties_of_soft_targets(world, candidates, similarity, max_mass, sigma):
    words, eligible, k, target, prediction = world
    teacher = SelfTeacher(candidates, k, similarity, sigma, 1.0, max_mass, eligible)
    teacher.refresh(words)
    ids, weights, _ = teacher.soft_target(target, prediction, words)
    assert torch.allclose(weights.sum(1), torch.ones(len(target)), atol=1e-6)
    assert (weights >= 0).all()
    assert (1 - weights[:, 0] <= max_mass + 1e-6).all()
    assert ids[:, 0].equal(target)
    candidates_with_mass = ids[:, 1:][weights[:, 1:] > 0]
    assert torch.isin(candidates_with_mass, eligible).all()
    own = ids[:, 1:].eq(target.unsqueeze(1))
    assert (weights[:, 1:][own] == 0).all()
    # no candidate twice
    dense = torch.zeros(len(target), len(words)).scatter_add_(1, ids, (weights > 0).float())
    assert dense.max() <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(world=worlds(), candidates=st.sampled_from(CANDIDATES), seed=st.integers(0, 2**31))
def test_renaming_the_words_renames_the_soft_targets(world, candidates, seed):
    words, eligible, k, target, prediction = world
    generator = torch.Generator().manual_seed(seed)
    # Distinct distances: which of equally near words is taken depends on their ids.
    words = words + 0.01 * torch.randn(words.shape, generator=generator)
    new_id = torch.randperm(len(words), generator=generator)
    renamed = torch.empty_like(words)
    renamed[new_id] = words

    def dense(words, eligible, target, prediction):
        teacher = SelfTeacher(candidates, k, "euclidean", eligible=eligible.sort().values)
        teacher.refresh(words)
        ids, weights, _ = teacher.soft_target(target, prediction, words)
        return torch.zeros(len(target), len(words)).scatter_add_(1, ids, weights)

    before = dense(words, eligible, target, prediction)
    after = dense(renamed, new_id[eligible], new_id[target], new_id[prediction])
    assert torch.allclose(before, after[:, new_id], atol=1e-5)
