"""docs/results/serving.md says what the stored results say."""


def test_the_page_is_made_from_the_stored_results(benchmark_script):
    benchmark_script("serving.doc").main(["--check"])
