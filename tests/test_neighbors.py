"""The blocked top-k against a full sort of all distances."""

import pytest
import torch

from fairseq_skd import nearest_neighbors


def by_full_sort(words, k, eligible=None, similarity="euclidean"):
    """The definition: all distances in float64, sorted; equal ones by id."""
    words = words.double()
    if similarity == "cosine":
        words = torch.nn.functional.normalize(words, dim=1)
    distances = (words.unsqueeze(1) - words.unsqueeze(0)).square().sum(2).sqrt()
    distances.fill_diagonal_(float("inf"))
    if eligible is not None:
        mask = torch.ones(len(words), dtype=torch.bool)
        mask[eligible] = False
        distances[:, mask] = float("inf")
    values, ids = distances.sort(dim=1, stable=True)
    return ids[:, :k], values[:, :k]


# Sizes around the group of 32 columns, blocks of a single row, k up to all the others.
SHAPES = [(2, 1, 1), (31, 4, 3), (32, 1, 5), (33, 7, 32), (65, 3, 10), (200, 16, 50), (501, 8, 7)]


@pytest.mark.parametrize("similarity", ["euclidean", "cosine"])
@pytest.mark.parametrize("block_bytes", [1, 10_000, 64 * 2**20])
@pytest.mark.parametrize(("num_words", "dim", "k"), SHAPES)
def test_equals_a_full_sort(num_words, dim, k, block_bytes, similarity):
    if similarity == "cosine" and dim == 1:
        dim = 2  # in one dimension all directions are equal or opposite, and every word ties
    words = torch.randn(num_words, dim, generator=torch.Generator().manual_seed(num_words))
    found = nearest_neighbors(words, k, similarity=similarity, block_bytes=block_bytes)
    _, distances = by_full_sort(words, k, similarity=similarity)
    assert torch.allclose(found.distances.double(), distances, atol=1e-6)
    # The ids are right if they are at these distances (rounding may swap near equals).
    space = torch.nn.functional.normalize(words, dim=1) if similarity == "cosine" else words
    here = (space.unsqueeze(1) - space[found.ids]).double().square().sum(2).sqrt()
    assert torch.allclose(here, distances, atol=1e-5)
    assert all(len(set(row)) == k for row in found.ids.tolist())


@pytest.mark.parametrize("block_bytes", [1, 10_000, 64 * 2**20])
@pytest.mark.parametrize(("num_words", "dim", "k"), SHAPES)
def test_ties_go_to_the_smaller_id(num_words, dim, k, block_bytes):
    generator = torch.Generator().manual_seed(dim)
    words = torch.randint(-2, 3, (num_words, dim), generator=generator).float()
    found = nearest_neighbors(words, k, block_bytes=block_bytes)
    ids, distances = by_full_sort(words, k)
    assert found.ids.equal(ids)
    assert torch.allclose(found.distances.double(), distances)


def test_all_words_equal():
    found = nearest_neighbors(torch.ones(100, 3), 4)
    assert found.ids[50].tolist() == [0, 1, 2, 3]
    assert found.ids[2].tolist() == [0, 1, 3, 4]
    assert not found.distances.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_measured_in_float32(dtype):
    words = torch.randn(300, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = nearest_neighbors(words, 10)
    ids, distances = by_full_sort(words, 10)
    assert found.distances.dtype == torch.float32
    assert torch.allclose(found.distances.double(), distances, atol=1e-5)
    assert found.ids.equal(ids)


def test_words_far_from_the_origin_and_close_together():
    """The product alone would lose these distances: 1e-3 apart, at a norm of 100."""
    generator = torch.Generator().manual_seed(0)
    words = 25 + 1e-3 * torch.randn(64, 16, generator=generator)
    words[::8] += 1.0
    found = nearest_neighbors(words, 1)
    clusters = torch.arange(64) % 8 == 0
    assert clusters[found.ids.flatten()].equal(clusters)


def test_eligible():
    words = torch.randn(120, 8, generator=torch.Generator().manual_seed(1))
    eligible = torch.arange(4, 120, 3)
    found = nearest_neighbors(words, 9, eligible)
    assert found.ids.equal(by_full_sort(words, 9, eligible)[0])


@pytest.mark.parametrize("k", [0, -1, 10, 11])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k is {k}; with 10 eligible words .* at most 9"):
        nearest_neighbors(torch.randn(10, 2), k)


def test_not_a_matrix_and_unknown_similarity():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        nearest_neighbors(torch.randn(3), 1)
    with pytest.raises(ValueError, match="'manhattan'; allowed: euclidean, cosine"):
        nearest_neighbors(torch.randn(3, 2), 1, similarity="manhattan")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(bad):
    words = torch.randn(10, 2)
    words[3, 1] = bad
    said = (
        r"^self-KD: the output projection holds NaN or infinite values, so there are no distances "
        r"between words; training has diverged \(try a lower learning rate, more warm-up or "
        r"gradient clipping\)$"
    )
    with pytest.raises(RuntimeError, match=said):
        nearest_neighbors(words, 2)


def test_rounded_products_are_not_allowed_for_the_shortlist(monkeypatch):
    """With TF32, which a user may allow, true neighbours would fall out of it."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        exact, allowed = ("ieee", "ieee"), "tf32"

        def get():
            return matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision

        def set_(value):
            matmul.fp32_precision = value

    else:  # torch < 2.9
        exact, allowed = "highest", "high"
        get, set_ = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
    during = []
    addmm = torch.addmm

    def watching(*args, **kwargs):
        during.append(get())
        return addmm(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", watching)
    before = get() if isinstance(get(), str) else get()[0]
    try:
        set_(allowed)
        asked = get()
        nearest_neighbors(torch.randn(20, 3), 2)
        assert get() == asked != exact
    finally:
        set_(before)
    assert set(during) == {exact}
