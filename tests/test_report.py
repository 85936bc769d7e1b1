from __future__ import annotations

from makeready.report import make_console


def test_text_is_shown_as_it_is(capsys):
    console = make_console()
    console.print("a[/b] :key:", markup=False, soft_wrap=True)
    console.print("path [bold]c[/d]")
    assert capsys.readouterr().out == "a[/b] :key:\npath [bold]c[/d]\n"
