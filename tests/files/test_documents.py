"""A folder of documents as it is: one text a file, its path as id, and nothing left out unsaid."""

from __future__ import annotations

import pytest

from unmasked.errors import DataError, MissingExtraError
from unmasked.files import documents
from unmasked.files.source import Source

PAGE = """<!doctype html><html><head><title>A page</title><style>p {color: red}</style>
<script>if (a < b) { tell("<p>never</p>") }</script></head><body>
<h1>Bread &amp; butter</h1><p>First   <b>para</b>graph,<br>second line.</p><!-- unseen -->
<ul><li>one</li><li>two</ul><pre>def f():
    return 1</pre><table><tr><td>a</td><td>b</td></tr></table></body></html>"""


def small_pdf(text: str) -> bytes:
    """A page with one line of text, written by hand."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + end


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "papers"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_bytes("\ufeffOne line.\r\nAnother.\n".encode())
    (root / "deep" / "a.MD").write_text("# Title\n\nText.\n")
    (root / "deep" / "b.rst").write_text("Title\n=====\n")
    (root / "c.html").write_text(PAGE)
    (root / ".hidden.txt").write_text("no")
    for name in ("x.py", "y.py", "z.png", "Makefile"):
        (root / name).write_text("no")
    return root


def test_each_file_is_a_text_with_its_path_as_id(folder):
    source = Source(f"documents:{folder}")
    rows = {row.id: row.text for row in source.rows()}
    assert list(rows) == ["a.txt", "c.html", "deep/a.MD", "deep/b.rst"]
    assert rows["a.txt"] == "One line.\nAnother.\n"
    assert rows["deep/a.MD"] == "# Title\n\nText.\n"
    assert source.survey() == [1, 1, 1, 1]
    assert source.left_out == {".py": 2, ".png": 1, "without a suffix": 1}
    (one,) = Source(f"documents:{folder / 'a.txt'}").rows()
    assert (one.id, one.text) == ("a.txt", rows["a.txt"])


def test_a_page_is_what_a_reader_sees(folder):
    (row,) = Source(f"documents:{folder / 'c.html'}").rows()
    assert row.text == (
        "A page\n\nBread & butter\n\nFirst paragraph,\nsecond line.\n\none\n\ntwo\n\n"
        "def f():\n    return 1\n\na b"
    )


def test_pdf_and_docx(tmp_path):
    pytest.importorskip("pypdf", reason="the extra documents is not installed")
    docx = pytest.importorskip("docx", reason="the extra documents is not installed")
    (tmp_path / "a.pdf").write_bytes(small_pdf("Water boils."))
    made = docx.Document()
    made.add_paragraph("First.")
    table = made.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "left", "right"
    made.add_paragraph("Last.")
    made.save(str(tmp_path / "b.docx"))
    (tmp_path / "c.pdf").write_bytes(small_pdf("x")[:90])
    (tmp_path / "d.docx").write_bytes(b"no archive")
    rows = list(Source(f"documents:{tmp_path}").rows())
    assert [row.text for row in rows] == ["Water boils.", "First.\n\nleft\tright\n\nLast.", "", ""]
    for row, kind in zip(rows[2:], (".pdf", ".docx"), strict=True):
        assert row.fault[0].startswith(f"not readable as {kind} (")


def test_what_cannot_be_read_names_the_file(folder):
    (folder / "b.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"b\.txt: not UTF-8 .byte 0xe9.*Fix: convert"):
        list(Source(f"documents:{folder}").records())
    (folder / "b.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"b\.txt: an empty text.*Fix: remove the file"):
        list(Source(f"documents:{folder}").records())
    with pytest.raises(DataError, match="is not a file or folder"):
        list(Source(f"documents:{folder}/none").records())
    with pytest.raises(DataError, match=r"no document in it. Allowed: .*\.html"):
        list(Source(f"documents:{folder / 'x.py'}").records())
    with pytest.raises(DataError, match="whole files have no columns to keep.*Fix: leave"):
        list(Source(f"documents:{folder}", keep=("year",)).rows())


def test_a_library_that_is_not_there_is_named_before_anything_is_read(folder, monkeypatch):
    (folder / "e.docx").touch()
    monkeypatch.setattr(documents, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"python-docx.*\[documents\]"):
        _ = Source(f"documents:{folder}").files


def test_an_id_that_is_there_twice_is_refused_where_ids_must_differ(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "a"}\n{"id": 2, "text": "b"}\n')
    (tmp_path / "b.jsonl").write_text('{"id": "1", "text": "c"}\n')
    assert len(list(Source(str(tmp_path)).records())) == 3
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: the id '1' is also the id"):
        list(Source(str(tmp_path), distinct=True).records())


def test_documents_train_as_well(folder):
    from unmasked.train.data.texts import iterate_texts

    assert len(list(iterate_texts([f"documents:{folder}"], None))) == 4
