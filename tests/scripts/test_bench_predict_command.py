import pytest
from recorded import recorded


def test_it_compares_the_command_with_the_bare_forward_pass(tmp_path):
    options = ["--count", "50", "--models", "pcam_model4", "--rounds", "1", "--seconds", "0.2"]
    record, printed = recorded("bench_predict_command.py", tmp_path / "figures", *options)
    bare, plain, averaged = record["results"]
    assert plain["of_bare"] == plain["images_per_second"] / bare["images_per_second"]
    assert averaged["times_plain"] == averaged["seconds"] / plain["seconds"]
    assert plain["images_per_second"] == pytest.approx(50 / plain["seconds"])
    assert plain["anonymous_mib"] > 50
    assert (tmp_path / "figures.md").read_text().rstrip().endswith(printed.strip())
