"""Every test of training has a cache of its own, so that nothing is known from elsewhere."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLM_CACHE", str(tmp_path / "cache"))
