"""benchmarks/memory.py: what is read from the compiler's bytes."""

import memory


def row(crop, pairs, gigabytes):
    return {"crop": crop, "pairs": pairs, "bytes": gigabytes * 1e9}


def test_the_largest_batch_and_crop_lie_on_the_line_through_what_was_compiled():
    """A start of 1 GB and 2 GB a pair of 64³; 16, 40, 80 and 141 GB leave 14.4, 36, 72 and 126.9."""
    assert memory.largest([row(64, 1, 3.0), row(64, 5, 11.0)]) == {"pairs of 64³": [6, 17, 35, 62]}
    # One pair: 1 GB and 2 GB for each 64³ of its voxels, so 128³ take 17 GB and 240³ 106.5; sides are multiples of 16.
    assert memory.largest([row(64, 1, 3.0), row(128, 1, 17.0)]) == {"side of one pair's crops": [112, 160, 208, 240]}


def test_a_batch_larger_than_the_start_leaves_room_for_does_not_fit():
    assert memory.largest([row(64, 1, 20.0), row(64, 2, 21.0)])["pairs of 64³"] == [0, 17, 53, 107]
