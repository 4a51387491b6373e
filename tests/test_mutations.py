"""Files with a few changed bytes open or are refused, whatever the change: nothing else ever comes out of a loader."""

import pytest
from mutations import LOADERS, mutated, open_mutated


@pytest.mark.parametrize("num_files", [400, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("loader", LOADERS)
def test_mutated_files_are_opened_or_refused(tmp_path, loader, num_files):
    num_opened = open_mutated(loader, range(num_files), tmp_path)
    assert min(num_opened.values()) > num_files // 20  # or the changes would test nothing but the signature


@pytest.mark.parametrize("loader", LOADERS)
def test_the_same_number_is_the_same_file(loader):
    files = [mutated(loader, number) for number in range(50)]
    assert files == [mutated(loader, number) for number in range(50)]
    assert len(set(files)) > 40
