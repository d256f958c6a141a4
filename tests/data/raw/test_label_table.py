import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcam_jax.data.raw.label_table import read_label_table
from pcam_jax.runtime.errors import UserError

law = settings(deadline=None, derandomize=True, max_examples=300)


def read(text: str, classes: int | None = 2):
    return read_label_table(text.encode(), "labels.csv", classes)


@pytest.mark.parametrize(
    "text",
    [
        "id,label\nb,1\na,0\n",
        "\ufeffid,label\r\nb,1\r\na,0\r\n",
        'label,"id",note\n1,b,x\n\n 0 , a ,"y, z"\n',
        "id,label\nb,1.0\na,0.0",
    ],
    ids=["plain", "bom and crlf", "more columns, quotes, blank line", "floats"],
)
def test_reads_ids_and_labels_in_the_files_order(text):
    assert read(text) == ({"b": 1, "a": 0}, [])
    assert list(read(text)[0]) == ["b", "a"]


def test_a_submission_has_an_order_and_no_labels():
    assert read("id,label\nb,0\na,0.5\n", classes=None) == ({"b": -1, "a": -1}, [])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("id,klass\na,0\n", "no column 'label' (its columns: id, klass)"),
        ("name,label\na,0\n", "no column 'id'"),
        ("", "its columns: none"),
        ("id;label\na;0\n", "id;label"),
        ('"id,label\na,1\nb,0\n', "id,label"),
        ('id,label\n"' + "a" * 200_000 + '",0\n', "line 2"),
    ],
)
def test_what_is_no_label_table_is_an_error_naming_the_file(text, named):
    with pytest.raises(UserError) as caught:
        read(text)
    assert "labels.csv" in str(caught.value)
    assert named in str(caught.value)
    assert str(
        caught.value
    ).isprintable()  # one line, also where a quote that is never closed makes the header many


def test_other_encodings_are_an_error():
    with pytest.raises(UserError, match="UTF-8"):
        read_label_table("id,label\na,0\n".encode("utf-16"), "labels.csv", 2)


@pytest.mark.parametrize("value", ["2", "-1", "", "x", "0.5", "nan", "1e0", "²", "9" * 5000])
def test_a_third_class_is_a_fault_and_left_out(value):
    labels, (fault,) = read(f"id,label\na,0\nb,{value}\n")
    assert labels == {"a": 0}
    assert (fault.problem, fault.id) == ("bad label", "b")
    assert "line 3" in fault.detail
    assert len(fault.detail) < 120


@pytest.mark.parametrize(("row", "name"), [("a", "a"), ("a,0,0", "a"), (",1", "")])
def test_rows_of_another_width_or_without_id_are_faults(row, name):
    labels, (fault,) = read(f"id,label\nb,1\n{row}\n")
    assert labels == {"b": 1}
    assert (fault.problem, fault.id) == ("bad row", name)


def test_an_id_that_stands_twice_is_kept_only_if_its_rows_agree():
    labels, faults = read("id,label\na,0\na,0\nb,0\nb,1\nb,0\nc,1\n")
    assert labels == {"a": 0, "c": 1}
    assert [(fault.problem, fault.id) for fault in faults] == [("duplicate id", name) for name in "abb"]


@law
@given(st.binary(max_size=300))
def test_arbitrary_bytes_give_labels_or_a_user_error(content):
    try:
        labels, _ = read_label_table(b"id,label\n" + content, "labels.csv", 2)
    except UserError:
        return
    assert set(labels.values()) <= {0, 1}


@law
@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), st.integers(0, 1)
    )
)
def test_what_is_written_is_read_back(labels):
    text = "id,label\n" + "".join(f"{name},{label}\n" for name, label in labels.items())
    assert read(text) == (labels, [])
