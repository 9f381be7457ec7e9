"""docs/results/quality.md says what the stored result says."""


def test_the_table_of_exact_deltas_is_made_from_the_stored_result(benchmark_script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["exact.py", "--doc", "--check"])
    benchmark_script("compression.exact").main()


def test_what_was_measured_was_restored_and_is_as_small_as_promised(benchmark_script):
    exact = benchmark_script("compression.exact")
    for name, pairs in exact.cases(1 << 16):
        if not name.startswith("example"):
            row = exact.measure(name, pairs, 1)
            assert row["bytes"] < (0.7 if "float32" in name else 0.6), name
