"""Reference banks: matching against the authors' and a naive oracle, memory, files."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from adpretrain_hf import ReferenceBank, matching
from adpretrain_hf.errors import BundleError, InputError, MissingPathError
from adpretrain_hf.matching import nearest_reference, to_rows
from adpretrain_hf.reference import is_bank, residuals_per_image
from tests.conftest import make_extractor, random_image


def random_bank(k: int = 40, c: int = 16, levels: int = 2, seed: int = 0, **about: object) -> ReferenceBank:
    generator = torch.Generator().manual_seed(seed)
    return ReferenceBank([torch.randn(k, c, generator=generator) for _ in range(levels)], **about)


def naive_residual(features: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    rows = features.flatten(2).transpose(1, 2)  # (B, h*w, C)
    similarity = F.normalize(rows, dim=-1) @ F.normalize(references, dim=-1).T
    return (rows - references[similarity.argmax(-1)]).transpose(1, 2).reshape(features.shape)


def test_residuals_equal_the_authors(golden):
    bank = ReferenceBank([golden[f"matching.references.{level}"] for level in range(4)])
    residuals = bank.residuals([golden[f"matching.features.{level}"] for level in range(4)])
    for level, residual in enumerate(residuals):
        assert torch.equal(residual, golden[f"matching.residual.{level}"])


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 3),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    c=st.sampled_from([1, 3, 16]),
    k=st.integers(1, 70),
    chunk=st.sampled_from([1, 7, 64]),
)
def test_chunks_do_not_change_the_result(b, h, w, c, k, chunk):
    features, bank = torch.randn(b, c, h, w), random_bank(k, c, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_QUERY_CHUNK", chunk)
        patch.setattr(matching, "_REFERENCE_CHUNK", chunk)
        residual = bank.residuals([features])[0]
    expected = naive_residual(features, bank.patches[0])
    if c > 1:  # in one dimension all directions are ties
        torch.testing.assert_close(residual, expected, atol=1e-5, rtol=1e-5)
    assert residual.shape == features.shape


def test_of_equals_the_first_reference_is_taken(monkeypatch):
    monkeypatch.setattr(matching, "_REFERENCE_CHUNK", 2)
    references = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    assert nearest_reference(torch.tensor([[5.0, 0.0]]), references).tolist() == [1]


def test_the_longest_is_not_the_nearest():
    references = torch.tensor([[100.0, 100.0], [1.0, 0.0]])
    assert nearest_reference(torch.tensor([[10.0, 1.0]]), references).tolist() == [1]


def test_an_image_of_the_bank_has_residual_zero():
    maps = [torch.randn(3, 16, 4, 4) for _ in range(2)]
    bank = ReferenceBank.from_features(maps)
    assert (len(bank), bank.num_images) == (48, 3)
    for residual in bank.residuals([level[1:2] for level in maps]):
        assert not residual.any()


def test_zero_tokens_do_not_give_nan():
    bank = ReferenceBank([torch.zeros(3, 4)])
    assert bank.residuals([torch.zeros(1, 4, 2, 2)])[0].isfinite().all()


def test_a_large_bank_needs_no_large_similarity_matrix():
    features, bank = torch.randn(32, 8, 16, 16), random_bank(16_000, 8, 1)
    full_matrix = 32 * 256 * 16_000 * 4  # 0.5 GB
    largest = 0

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **kwargs or {})
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Spy():
        bank.residuals([features])
    assert largest < 100e6 < full_matrix


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage_stays_close(dtype):
    bank = random_bank(levels=1)
    rows = bank.patches[0][:32] + 0.05 * torch.randn(32, 16)  # near one reference each: rounding chooses no other
    features = rows.view(2, 16, 16).transpose(1, 2).unflatten(2, (4, 4))
    residual = bank.to(dtype=dtype).residuals([features])[0]
    assert residual.dtype == torch.float32
    expected = bank.residuals([features])[0]
    assert (residual - expected).norm() / features.norm() < 0.01


def test_residual_has_the_features_dtype():
    assert random_bank(levels=1).residuals([torch.randn(1, 16, 2, 2).bfloat16()])[0].dtype == torch.bfloat16


def test_gradients_flow_to_the_features():
    features = torch.randn(1, 16, 2, 2, requires_grad=True)
    random_bank(levels=1).residuals([features])[0].sum().backward()
    assert torch.equal(features.grad, torch.ones_like(features))


def test_every_image_against_its_own_bank():
    one, two = random_bank(seed=1), random_bank(seed=2)
    features = [torch.randn(3, 16, 4, 4) for _ in range(2)]
    mixed = residuals_per_image(features, [two, one, two])
    for level in range(2):
        for row, bank in enumerate((two, one, two)):
            alone = bank.residuals([maps[row : row + 1] for maps in features])[level][0]
            torch.testing.assert_close(mixed[level][row], alone, atol=1e-5, rtol=1e-5)


def test_a_wrong_number_of_banks_is_refused():
    with pytest.raises(InputError, match="got 2 reference banks for 3 images, expected one for each"):
        residuals_per_image([torch.zeros(3, 16, 2, 2)] * 2, [random_bank()] * 2)


def test_saved_and_loaded_again_it_is_the_same(tmp_path):
    bank = random_bank(fingerprint="f00", category="käse", num_images=5).to(dtype=torch.bfloat16)
    bank.save(tmp_path / "sub" / "bank.safetensors")
    again = ReferenceBank.load(tmp_path / "sub" / "bank.safetensors")
    assert (again.fingerprint, again.category, again.num_images) == ("f00", "käse", 5)
    for a, b in zip(bank.patches, again.patches, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16 and torch.equal(a, b)
    assert "käse" in repr(again) and "40 patches" in repr(again)


def test_the_same_bank_gives_the_same_bytes(tmp_path):
    for name in "ab":
        random_bank(fingerprint="f00", category="screw", num_images=5).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_slice_of_other_tensors_is_saved_alone(tmp_path):
    large = torch.randn(1000, 16)
    ReferenceBank([large[:2], large[2:4]]).save(tmp_path / "bank.safetensors")
    assert (tmp_path / "bank.safetensors").stat().st_size < 2000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "no reference bank at .*make one with `adpretrain reference`"),
        ("text", "is not a whole safetensors file"),
        ("truncated", "is not a whole safetensors file"),
        ("other", "is not a reference bank: its metadata lack 'adpretrain_reference_bank_1'"),
        ("levels", r"missing \['level.1'\], unexpected \['level.2'\]"),
        ("nan", "NaN or infinite values"),
        ("shape", "got reference patches of shapes"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, damage, message):
    path = tmp_path / "bank.safetensors"
    random_bank().save(path)
    tensors, about = load_file(path), {"adpretrain_reference_bank_1": "{}"}
    if damage == "missing":
        path.unlink()
    elif damage == "text":
        path.write_text("hello")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    elif damage == "other":
        save_file(tensors, path)
    elif damage == "levels":
        save_file({"level.0": tensors["level.0"], "level.2": tensors["level.1"]}, path, metadata=about)
    elif damage == "nan":
        tensors["level.1"][3, 3] = torch.nan
        save_file(tensors, path, metadata=about)
    elif damage == "shape":
        save_file(tensors | {"level.1": torch.zeros(3, 3)}, path, metadata=about)
    with pytest.raises(MissingPathError if damage == "missing" else BundleError, match=message):
        ReferenceBank.load(path)


@pytest.mark.parametrize(
    "patches", [[], [torch.zeros(0, 4)], [torch.zeros(2, 3, 4)], [torch.zeros(2, 4), torch.zeros(3, 4)]]
)
def test_patches_that_make_no_bank_are_refused(patches):
    with pytest.raises(InputError, match=r"expected one \(K, C\) for each level, K >= 1"):
        ReferenceBank(patches)


@pytest.mark.parametrize(
    "features", [[torch.zeros(1, 16, 2, 2)], [torch.zeros(1, 8, 2, 2)] * 2, [torch.zeros(16, 2)] * 2]
)
def test_features_that_do_not_fit_are_refused(features):
    with pytest.raises(InputError, match=r"the bank has 2 levels of \(B, 16, h, w\)"):
        random_bank().residuals(features)


def test_threads_share_a_bank():
    bank, features = random_bank(), [torch.randn(2, 16, 4, 4) for _ in range(2)]
    expected, results = bank.residuals(features), []
    threads = [threading.Thread(target=lambda: results.append(bank.residuals(features))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_bank_without_an_image_is_the_bank_of_the_others():
    maps = [torch.randn(3, 5, 2, 2) for _ in range(2)]
    bank = ReferenceBank.from_features(maps, fingerprint="0123456789abcdef", category="screw")
    others = bank.without_image(1)
    expected = ReferenceBank.from_features([level[[0, 2]] for level in maps])
    assert all(torch.equal(a, b) for a, b in zip(others.patches, expected.patches, strict=True))
    assert (others.num_images, others.fingerprint, others.category) == (2, "0123456789abcdef", "screw")


def test_images_of_a_bank_are_compared_with_the_others_alone():
    """As with the bank of the others, whether the images have equally many patches or not."""
    few, more = torch.randn(2, 5, 2, 2), torch.randn(1, 5, 3, 4)
    patches = torch.cat([to_rows(few), to_rows(more)])
    unequal = ReferenceBank([patches] * 2, num_images=3, image_patches=[4, 4, 12])
    equal = ReferenceBank([to_rows(few)] * 2, num_images=2)
    for bank, features, own in ((equal, few, [0, 1]), (unequal, few, [0, None]), (unequal, more, [2])):
        banks = [bank if place is None else bank.without_image(place) for place in own]
        expected = residuals_per_image([features] * 2, banks)
        for got, wanted in zip(bank.residuals([features] * 2, own), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert unequal.without_image(1).image_patches == [4, 12]
    assert unequal.compact(0.5).image_patches == []


def test_images_that_an_extractor_prepares_to_unequal_sizes_can_be_left_out(tiny_folder, tmp_path):
    extractor = make_extractor(tiny_folder, resize_mode="resize")
    images = [random_image(0, 64, 64), random_image(1, 128, 64)]
    extractor.make_reference(images).save(tmp_path / "bank.safetensors")
    bank = ReferenceBank.load(tmp_path / "bank.safetensors")
    assert bank.image_patches == [16, 32] and len(bank.without_image(1)) == 16
    with pytest.raises(InputError, match="got 2 images with 48 reference patches, expected 1 with 4, as image_patches"):
        ReferenceBank(bank.patches, num_images=2, image_patches=[4])
    alone = extractor.set_reference(images[:1]).score(images[1:]).scores
    assert torch.allclose(extractor.set_reference(bank).score(images[1:]).scores, alone)


@pytest.mark.parametrize(("images", "index"), [(1, 0), (4, 4), (4, -1), (3, 0), (0, 0)])
def test_images_that_cannot_be_left_out_are_refused(images, index):
    message = f"cannot leave image {index} out of a bank of {images} images with 40 patches"
    with pytest.raises(InputError, match=message):
        random_bank(k=40, num_images=images).without_image(index)


def test_a_bank_is_known_by_what_it_is_and_not_by_its_ending(extractor, tmp_path):
    bank = extractor.make_reference([random_image(1)])
    bank.save(tmp_path / "screw.bank")
    assert is_bank(tmp_path / "screw.bank") and is_bank("missing.safetensors")
    extractor.set_reference(tmp_path / "screw.bank")
    assert torch.equal(extractor.reference.patches[0], bank.patches[0])
    random_image(1).save(tmp_path / "image.png")
    assert not is_bank(tmp_path / "image.png") and not is_bank(tmp_path) and not is_bank(tmp_path / "missing.png")


def test_values_that_do_not_fit_a_precision_are_told():
    large = ReferenceBank([level * 1e8 for level in random_bank().patches])
    with pytest.raises(InputError, match=r"the bank's values, up to .*e\+08, do not fit torch.float16: take bfloat16"):
        large.to(dtype=torch.float16)
    assert large.to(dtype=torch.bfloat16).patches[0].isfinite().all()


# Banks that live: images come and go, and none is encoded again


def about(bank: ReferenceBank) -> dict[str, object]:
    return vars(bank) | {"patches": None, "_inverse_norms": None}


def same(one: ReferenceBank, other: ReferenceBank) -> bool:
    levels = zip(one.patches, other.patches, strict=True)
    return about(one) == about(other) and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in levels)


@pytest.mark.parametrize("sizes", [[(48, 40)] * 4, [(64, 64), (128, 64), (64, 64), (64, 32)]])
def test_the_sum_of_banks_is_the_bank_of_all_their_images(tiny_folder, tmp_path, sizes):
    extractor = make_extractor(tiny_folder, resize_mode="resize")
    for number, size in enumerate(sizes):
        random_image(number, *size).save(tmp_path / f"{number}.png")
    paths = sorted(tmp_path.glob("*.png"))
    make = lambda paths: extractor.make_reference(paths, category="screw", batch_size=1)  # noqa: E731
    every = make(paths)
    assert [image.name for image in every.images] == ["0.png", "1.png", "2.png", "3.png"]
    assert same(make(paths[:1]) + make(paths[1:]), every)
    assert same(every.remove("1.png").remove(0), make(paths[2:]))
    assert same(every.remove(3) + make(paths[3:]), every)
    (make(paths[:2]) + make(paths[2:])).save(tmp_path / "sum.safetensors")
    assert same(ReferenceBank.load(tmp_path / "sum.safetensors"), every)
    assert str(tmp_path).encode() not in (tmp_path / "sum.safetensors").read_bytes()


def test_a_sum_has_the_precision_of_the_first(extractor):
    one, two = (extractor.make_reference([random_image(seed)], category="screw"[:seed]) for seed in (0, 5))
    half = one.to(dtype=torch.bfloat16) + two
    assert half.category == "screw" and {level.dtype for level in half.patches} == {torch.bfloat16}
    assert torch.equal(half.patches[1][16:], two.patches[1].bfloat16())
    assert (two + one.to(dtype=torch.bfloat16)).patches[0].dtype == torch.float32


def test_core_sets_are_added_to_core_sets():
    one, two = (random_bank(num_images=2, seed=seed).compact(0.5) for seed in (1, 2))
    both = one + two
    assert (len(both), both.num_images, both.compacted, both.image_patches) == (40, 4, True, [])


def test_banks_of_which_one_knows_its_images():
    both = random_bank(num_images=2) + random_bank(num_images=1, k=20, images=[("a.png", "0123")], seed=1)
    assert both.images == [("", ""), ("", ""), ("a.png", "0123")]
    assert both.num_images == 3 and both.image_patches == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"fingerprint": "f01"}, r"got other values of fingerprint: \[\('f00', 'f01'\)\]"),
        ({"category": "nut"}, r"got other values of category: \[\('screw', 'nut'\)\]"),
        ({"compacted": True}, r"got other values of compacted: \[\(None, True\)\]"),
        ({"levels": 3}, r"got other values of levels: \[\(2, 3\)\]"),
        ({"c": 8}, r"got other values of channels: \[\(16, 8\)\]"),
        ({"num_images": 0}, "does not know which patches are whose"),
        ({"images": [("b.png", "02"), ("c.png", "01")]}, "both reference banks have the images c.png: remove them"),
        ({"images": ["02", "01"]}, "both reference banks have the images 01: remove them"),
    ],
)
def test_banks_that_do_not_go_together_are_not_added(other, message):
    kind = {"fingerprint": "f00", "category": "screw", "num_images": 2}
    with pytest.raises(InputError, match=message):
        random_bank(**kind, images=[("a.png", "01"), ("b.png", "00")]) + random_bank(**kind | other)


def test_only_banks_are_added():
    with pytest.raises(TypeError, match="unsupported operand"):
        random_bank() + "images"


def test_an_image_is_removed_by_a_name_that_is_its_alone():
    bank = random_bank(k=40, num_images=4, images=[("a.png", "1"), ("b.png", "2"), ("b.png", "3"), ("c.png", "4")])
    assert bank.remove("c.png").images == bank.images[:3]
    with pytest.raises(InputError, match="2 images of the bank are called 'b.png'.*or its place, from 0"):
        bank.remove("b.png")
    with pytest.raises(InputError, match="0 images of the bank are called 'a.jpg': expected one of .*mean 'a.png'?"):
        bank.remove("a.jpg")


def test_a_file_that_knows_no_names_is_read(tmp_path):
    """Written by an earlier version."""
    tensors = {"level.0": torch.ones(4, 3)}
    metadata = {"adpretrain_reference_bank_1": '{"num_images": 2, "images": ["0123", "4567"]}'}
    save_file(tensors, tmp_path / "bank.safetensors", metadata=metadata)
    assert ReferenceBank.load(tmp_path / "bank.safetensors").images == [("", "0123"), ("", "4567")]


def test_own_images_are_left_out_of_the_bank_of_each():
    maps = [torch.randn(3, 16, 2, 2) for _ in range(2)]
    one, two = ReferenceBank.from_features(maps), random_bank(seed=2)
    mixed = residuals_per_image(maps, [one, two, one], own=[0, None, 2])
    for row, bank in enumerate((one.remove(0), two, one.remove(2))):
        alone = bank.residuals([level[row : row + 1] for level in maps])
        for got, expected in zip(mixed, alone, strict=True):
            torch.testing.assert_close(got[row : row + 1], expected, atol=1e-5, rtol=1e-5)
