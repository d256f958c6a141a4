from recorded import recorded


def test_it_compares_the_command_with_its_bare_step(tmp_path):
    options = [
        "--counts",
        "60",
        "--models",
        "pcam_model4",
        "--batch",
        "8",
        "--rounds",
        "1",
        "--seconds",
        "0.2",
    ]
    record, printed = recorded("bench_end_to_end.py", tmp_path / "figures", *options)
    bare, command = record["results"]
    assert (bare["contender"], command["contender"]) == ("bare step", "pcam_jax.train")
    assert command["of_bare_step"] == command["images_per_second"] / bare["images_per_second"]
    assert command["epoch_seconds"] > 0
    assert command["anonymous_mib"] > 50
    assert record["command"].endswith(f"--output {tmp_path / 'figures'}")
    assert (tmp_path / "figures.md").read_text().rstrip().endswith(printed.strip())
