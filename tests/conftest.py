"""What all tests share: GPU tests skip themselves where there is no GPU; indexes of data files go
to a folder of this run."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Also for the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CORES_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def same_arithmetic():
    """What the last digits depend on: benchmarks set the number of threads, DeepSpeed's ZeRO-3
    replaces the linear function, and a loading that fails may leave its number format behind."""
    count, linear = torch.get_num_threads(), torch.nn.functional.linear
    dtype = torch.get_default_dtype()
    yield
    torch.set_num_threads(count)
    torch.set_default_dtype(dtype)
    torch.nn.functional.linear = linear
