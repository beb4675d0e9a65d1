"""What a processor computes fast, by what Linux tells of it."""

import pytest

from normlab.common import cpu
from normlab.launchers import plan


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile", "amx_bf16"),
        ("flags\t\t: fpu avx512f avx512_bf16", "avx512_bf16"),
        ("flags\t\t: fpu avx2 avx512_bf16x", ""),
        ("Features\t: fp asimd", ""),  # of another kind of processor
    ],
)
def test_bf16_is_known_by_the_flags_of_the_processor(tmp_path, flags, found) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\nmodel name\t: amx_bf16\n")
    assert cpu.bf16_instructions(tmp_path / "cpuinfo") == found
    assert cpu.bf16_instructions(tmp_path / "missing") == ""


@pytest.mark.parametrize(
    ("instructions", "precision", "said"),
    [
        ("amx_bf16", "fp32", "This processor has amx_bf16"),
        ("amx_bf16", "bf16", ""),
        ("", "bf16", "no instructions for bf16"),
        ("", "fp32", ""),
    ],
)
def test_a_plan_tells_of_the_faster_precision(monkeypatch, instructions, precision, said) -> None:
    monkeypatch.setattr(cpu, "bf16_instructions", lambda: instructions)
    sentence = plan._on_bf16({precision})
    assert said in sentence
    assert bool(said) == bool(sentence)
