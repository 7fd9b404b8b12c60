"""The transformer in scikit-learn's pipelines, before scikit-learn's own detectors and PyOD's."""

from __future__ import annotations

import copy
import pickle

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import Pipeline

from adpretrain_hf import ADPretrainFeatureExtractor
from adpretrain_hf.errors import BundleError, ImageError, InputError
from adpretrain_hf.integrations.sklearn import ADPretrainTransformer
from tests.conftest import BUNDLE, PHOTOS, make_extractor, random_image


def images(first: int, number: int):
    return [random_image(seed) for seed in range(first, first + number)]


def longest(features):
    """The descriptor of one image, spelled out."""
    rows = []
    for level in features.values():
        patches = [level[0, :, y, x] for y in range(level.shape[2]) for x in range(level.shape[3])]
        rows.append(max(patches, key=torch.linalg.norm).abs())
    return torch.cat(rows).numpy()


@pytest.fixture(scope="module")
def fitted(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    make_extractor(tiny_folder).save_pretrained(folder)
    return ADPretrainTransformer(folder, num_references=3).fit(images(0, 6))


class TestDescriptors:
    def test_new_images_are_compared_with_all_references(self, fitted):
        assert fitted.reference_indices_.tolist() == [0, 2, 4]
        extractor = ADPretrainFeatureExtractor.from_pretrained(fitted.bundle)
        extractor.set_reference([images(0, 6)[index] for index in (0, 2, 4)])
        given = fitted.transform(images(10, 3))
        assert given.shape == (3, 4 * 32) and given.dtype == np.float32
        for row, image in zip(given, images(10, 3), strict=True):
            np.testing.assert_allclose(row, longest(extractor(image)), atol=1e-6)

    def test_a_reference_is_compared_with_the_others(self, fitted):
        transformer, seen = clone(fitted), images(0, 6)
        given = transformer.fit_transform(seen)
        extractor = ADPretrainFeatureExtractor.from_pretrained(fitted.bundle)
        for index, references in {0: (2, 4), 1: (0, 2, 4), 2: (0, 4), 3: (0, 2, 4), 4: (0, 2), 5: (0, 2, 4)}.items():
            features = extractor(seen[index], [seen[place] for place in references])
            np.testing.assert_allclose(given[index], longest(features), atol=1e-6)
        # Also later: against itself a reference would be perfectly normal, more than any new image.
        np.testing.assert_allclose(transformer.transform(seen)[2], given[2], atol=1e-6)

    def test_of_references_it_warns_only_where_they_are_not_meant_to_be_described(self, fitted, caplog):
        transformer, seen = clone(fitted), images(0, 6)
        transformer.fit_transform(seen)
        assert "is a reference itself" not in caplog.text
        transformer.transform(seen)
        assert caplog.text.count("is a reference itself") == 1

    def test_mean_over_some_patches(self, fitted):
        transformer = clone(fitted).set_params(num_patches=1000).fit(images(0, 6))
        extractor = ADPretrainFeatureExtractor.from_pretrained(fitted.bundle)
        features = extractor(random_image(10), [images(0, 6)[index] for index in (0, 2, 4)])
        expected = torch.cat([level.abs().mean(dim=(0, 2, 3)) for level in features.values()])
        np.testing.assert_allclose(transformer.transform([random_image(10)])[0], expected, atol=1e-6)

    def test_of_images_in_tiles_the_longest_patches_of_all_windows(self, fitted):
        transformer = copy.deepcopy(fitted)
        image = random_image(3, 96, 64)
        transformer.extractor_.set_reference([random_image(2, 96, 64)], tiles=(2, 3))
        (features,) = transformer.extractor_.extract([image], progress=False)
        level = features[transformer.extractor_.layers[0]].transpose(0, 1).flatten(1)  # (C, T*h*w)
        longest = level.norm(dim=0).topk(min(transformer.num_patches, level.shape[1])).indices
        row = transformer.transform([image])[0]
        np.testing.assert_allclose(row[: len(level)], level[:, longest].abs().mean(dim=1), rtol=1e-5, atol=1e-6)

    def test_the_same_images_in_any_form(self, fitted, image_folder):
        paths = sorted(path for path in image_folder.rglob("*") if path.is_file())
        expected = clone(fitted).fit_transform(paths)
        arrays = np.stack([np.array(random_image(seed)) for seed in range(3)])
        for form in (image_folder, str(image_folder), np.array(paths), np.array([str(path) for path in paths])):
            np.testing.assert_array_equal(clone(fitted).fit_transform(form), expected)
        prepared = fitted.extractor_.preprocess(images(0, 3))
        of_arrays, of_tensor = (clone(fitted).fit_transform(form) for form in (arrays, prepared))
        np.testing.assert_array_equal(of_arrays, of_tensor)

    def test_images_of_many_shapes(self, tiny_folder, tmp_path):
        make_extractor(tiny_folder, resize_mode="resize").save_pretrained(tmp_path)
        shapes = [random_image(1, 40, 48), random_image(2, 80, 40), random_image(3, 40, 60), random_image(4, 90, 40)]
        given = ADPretrainTransformer(tmp_path).fit_transform(shapes)
        extractor = ADPretrainFeatureExtractor.from_pretrained(tmp_path)
        np.testing.assert_allclose(given[1], longest(extractor(shapes[1], [*shapes[:1], *shapes[2:]])), atol=1e-6)

    def test_size_and_mode_are_arguments(self, fitted):
        transformer = clone(fitted).set_params(image_size=64, resize_mode="resize").fit(images(0, 2))
        assert transformer.extractor_.preprocess(random_image(1, 40, 80)).shape == (1, 3, 128, 64)


class TestEstimator:
    def test_can_be_cloned(self, fitted):
        arguments = {"variant": "norm", "num_references": 5, "num_patches": 2, "batch_size": 4, "device": "cpu"}
        arguments |= {"image_size": 64, "resize_mode": "resize"}
        transformer = ADPretrainTransformer("acme/tiny", **arguments)
        assert transformer.get_params() == {"bundle": "acme/tiny"} | arguments
        assert vars(clone(transformer)) == vars(transformer) == transformer.get_params()  # nothing was loaded
        assert not hasattr(clone(fitted), "extractor_")

    def test_a_grid_search_works(self, fitted):
        pipeline = Pipeline([("features", clone(fitted)), ("detector", LocalOutlierFactor(1, novelty=True))])
        search = GridSearchCV(
            pipeline,
            {"features__num_patches": [1, 2]},
            scoring=lambda model, part: model.score_samples(part).mean(),
            cv=KFold(2),
            error_score="raise",
        )
        assert search.fit(images(0, 6)).best_params_["features__num_patches"] in (1, 2)

    @pytest.mark.parametrize("library", [pickle, joblib])
    def test_survives_pickling(self, fitted, library, tmp_path):
        expected = fitted.transform(images(10, 2))
        with (tmp_path / "transformer").open("wb") as file:
            library.dump(fitted, file)
        with (tmp_path / "transformer").open("rb") as file:
            np.testing.assert_array_equal(library.load(file).transform(images(10, 2)), expected)

    def test_columns_have_names(self, fitted):
        names = fitted.get_feature_names_out()
        assert [len(names), names[0], names[33]] == [128, "layer1_0", "layer2_1"]
        frames = clone(fitted).set_output(transform="pandas")
        assert list(frames.fit_transform(images(0, 3)).columns) == list(names)
        assert frames.transform(images(10, 2)).shape == (2, 128)


class TestErrors:
    def test_not_fitted(self):
        for call in (ADPretrainTransformer("acme/tiny").transform, ADPretrainTransformer("x").get_feature_names_out):
            with pytest.raises(NotFittedError, match="This ADPretrainTransformer instance is not fitted yet"):
                call(images(0, 1))

    def test_no_bundle(self):
        with pytest.raises(InputError, match="bundle is None, expected the id of a repository or a folder"):
            ADPretrainTransformer(None).fit(images(0, 2))

    def test_a_stack_of_grey_images(self, fitted):
        stack = np.zeros((3, 40, 40), dtype=np.uint8)
        with pytest.raises(ImageError, match="give a stack of grey images as a list of them"):
            fitted.transform(stack)
        assert fitted.transform(list(stack)).shape == (3, 128)

    def test_no_images(self, fitted):
        for call in (clone(fitted).fit, clone(fitted).fit_transform, fitted.transform):
            with pytest.raises(InputError, match="no images were given"):
                call([])

    def test_a_single_image(self, fitted):
        single = clone(fitted).fit(random_image(1))
        assert single.transform(random_image(2)).shape == (1, 128)
        message = "got 1 reference image to fit a detector with: expected at least 2 images and num_references >= 2"
        for transformer, given in ((clone(fitted), random_image(1)), (clone(fitted), images(0, 4))):
            with pytest.raises(InputError, match=message):
                transformer.set_params(num_references=1).fit_transform(given)

    @pytest.mark.parametrize("name", ["num_references", "num_patches"])
    @pytest.mark.parametrize("value", [0, 2.5, True, "many"])
    def test_numbers_out_of_range(self, fitted, name, value):
        with pytest.raises(InputError, match=f"{name} is {value!r}, expected an integer >= 1"):
            clone(fitted).set_params(**{name: value}).fit(images(0, 2))

    def test_what_cannot_be_loaded(self, fitted, tmp_path):
        with pytest.raises(BundleError, match="is not an ADPretrain bundle"):
            ADPretrainTransformer(tmp_path).fit(images(0, 2))
        with pytest.raises(ImageError, match=r"no such image: .*nothing.png"):
            fitted.transform([str(tmp_path / "nothing.png")])


def local_outlier_factor():
    return LocalOutlierFactor(n_neighbors=4, novelty=True)


def nearest_neighbors():
    return pytest.importorskip("pyod.models.knn").KNN(n_neighbors=2)


@pytest.mark.parametrize("detector", [local_outlier_factor, nearest_neighbors])
class TestDetectors:
    """scikit-learn's and PyOD's."""

    def test_in_a_pipeline(self, fitted, detector):
        pipeline = Pipeline([("features", clone(fitted)), ("detector", detector())]).fit(images(0, 6))
        alone = detector().fit(clone(fitted).fit_transform(images(0, 6)))
        expected = alone.decision_function(fitted.transform(images(10, 3)))
        np.testing.assert_allclose(pipeline.decision_function(images(10, 3)), expected)

    def test_tell_photographs_apart(self, photographs, detector):
        normal, test, is_anomalous = photographs
        scores = detector().fit(normal).decision_function(test)
        scores = -scores if detector is local_outlier_factor else scores  # of it, high ones are normal
        assert scores[is_anomalous].mean() > scores[~is_anomalous].mean()
        assert roc_auc_score(is_anomalous, scores) >= 0.95


@pytest.fixture(scope="module")
def photographs():
    """Descriptors by the embedded bundle, of normal photographs and of those to test, and which show a defect."""
    test = sorted((PHOTOS / "brick" / "test").rglob("*.jpg"))
    transformer = ADPretrainTransformer(BUNDLE, image_size=224)
    normal = transformer.fit_transform(PHOTOS / "brick" / "train" / "good")
    return normal, transformer.transform(test), np.array([path.parent.name != "good" for path in test])
