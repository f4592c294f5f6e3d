"""The bar of long work."""

from salience.core.progress import bar


def test_a_bar_is_shown_only_when_asked(capfd):
    with bar("working", 2) as advance:
        advance()
    assert capfd.readouterr() == ("", "")
    with bar("working", 4, True, done=1) as advance:
        advance()
        advance(2)
    out, err = capfd.readouterr()
    assert out == "" and "working" in err and "100%" in err
