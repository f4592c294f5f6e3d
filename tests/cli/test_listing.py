"""`salience methods`, `salience show`, help and version."""

import textwrap

import pytest

from salience.core.registry import entries


def test_methods_lists_filters_and_searches(cli):
    code, out, _ = cli("methods")
    assert code == 0 and all(slug in out for slug in entries())
    _, out, _ = cli("methods", "--unit", "token")
    assert "sstoken" in out and "lisa" not in out
    _, out, _ = cli("methods", "--search", "activation density")
    assert "deft" in out and "ist " not in out
    _, out, _ = cli("methods", "--search", "nothing like this")
    assert "no method matches" in out


def test_show_has_parameters_paper_and_use(cli):
    for slug, entry in entries().items():
        code, out, _ = cli("show", slug)
        assert code == 0 and entry.arxiv in out and "Parameters" in out and f"sal.{entry.name}(" in out
        assert "official code" in out.lower()


@pytest.mark.parametrize("slug", ["cutmix", "dhkd", "mc-temporal-dropout", "multi-sample-dropout", "nested-dropout",
                                  "pld", "projection-head"])  # fmt: skip
def test_show_prints_a_loop_that_runs(cli, slug):
    code, out, _ = cli("show", slug)
    _, _, loop = out.partition("In a loop of your own\n")
    assert code == 0 and "import torch, salience as sal" in loop and 5 <= len(loop.strip().splitlines()) <= 14
    exec(textwrap.dedent(loop), {})


def test_help_teaches(cli):
    code, out, _ = cli("--help")
    assert code == 0 and "tune" in out and "bench" in out and "methods" in out
    for command in ("tune", "bench", "methods"):
        code, out, _ = cli(command, "--help")
        assert code == 0 and "Examples" in out
    # square brackets are markup to rich
    shown = " ".join(cli("tune", "--help")[1].replace("│", " ").split())
    assert "LoRA rank [default: 8]." in shown and "Of everything [default: 0]." in shown
    code, out, _ = cli("--version")
    assert code == 0 and out.startswith("salience ")
