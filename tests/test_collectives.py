"""What is read from the text of compiled programs, in the forms that compilers write."""

import pytest

from alice_jax.ahead import collectives

# 16 × 8 numbers of two bytes are 256 bytes, a quarter of them 64.
PLAIN = """
ENTRY %main (a: bf16[4,8]) -> bf16[16,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[16,8]{1,0} parameter(1)
  %gathered = bf16[16,8]{1,0} all-gather(%a), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %share = bf16[4,8]{1,0} reduce-scatter(%gathered), channel_id=2, dimensions={0}, to_apply=%add
  %both = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-reduce(%share, %b), channel_id=3, to_apply=%add
  ROOT %again = bf16[16,8]{1,0} all-gather(%a), channel_id=4, dimensions={0}
}"""
STARTED = """
ENTRY %main (a: bf16[4,8]) -> bf16[16,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %sum = bf16[4,8]{1,0} all-reduce-start(%a), channel_id=1, to_apply=%add
  %summed = bf16[4,8]{1,0} all-reduce-done(%sum)
  %start = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[16,8]{1,0:T(8,128)(2,1)}) all-gather-start(%a), channel_id=2
  ROOT %done = bf16[16,8]{1,0} all-gather-done(%start)
}"""
HIDDEN = """
%first (a: bf16[4,8]) -> bf16[16,8] {
  %a.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %gather.1 = bf16[16,8]{1,0} all-gather(%a.1), channel_id=7, dimensions={0}
}

%second (a: bf16[4,8]) -> bf16[16,8] {
  %a.2 = bf16[4,8]{1,0} parameter(0)
  ROOT %gather.2 = bf16[16,8]{1,0:T(8,128)S(1)} all-gather(%a.2), channel_id=7, dimensions={0}
}

%all-reduce-scatter.3 (input: bf16[16,8]) -> bf16[4,8] {
  %input = bf16[16,8]{1,0} parameter(0)
  %sum = bf16[16,8]{1,0} all-reduce(%input), channel_id=8, to_apply=%add
  ROOT %slice = bf16[4,8]{1,0} dynamic-slice(%sum, %place), dynamic_slice_sizes={4,8}
}"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PLAIN, [("all-gather", 256, 2), ("all-reduce", 64 + 256, 1), ("reduce-scatter", 256, 1)]),
        (STARTED, [("all-gather", 256, 1), ("all-reduce", 64, 1)]),
        (HIDDEN, [("all-gather", 256, 1), ("reduce-scatter", 256, 1)]),
    ],
    ids=["plain", "asynchronous", "hidden by a TPU's computation"],
)
def test_collectives_in_the_forms_that_compilers_write(text, expected):
    assert collectives.found(text) == expected
