"""Files with a few changed bytes open or are refused, whatever the change: nothing else ever comes out of a loader."""

import pytest
from mutations import LOADERS, mutated, open_mutated

NUM_FILES = 2000  # of each loader; tests/mutations.py opens more by hand


@pytest.mark.parametrize("loader", LOADERS)
def test_mutated_files_are_opened_or_refused(tmp_path, loader):
    num_opened = open_mutated(loader, range(NUM_FILES), tmp_path)
    assert min(num_opened.values()) > NUM_FILES // 20  # or the changes would test nothing but the signature


@pytest.mark.parametrize("loader", LOADERS)
def test_the_same_number_is_the_same_file(loader):
    files = [mutated(loader, number) for number in range(50)]
    assert files == [mutated(loader, number) for number in range(50)]
    assert len(set(files)) > 40
