"""One module a suite, each with run(quick) -> rows for bench/results."""
