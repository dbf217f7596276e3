"""`make bench`: our losses beside what they replace, in one run, each checked against float64 before it is timed.

cases.py says what is measured and data.py on which inputs, bench_<family>.py who takes part and what we claim; check.py
tells who is right, measure.py and memory.py take time and memory, single.py gives a case a process of its own, and
run.py goes through them; report.py and charts.py show what was found, compare.py what became slower. test_cases.py has
the same cases for pytest-benchmark.
"""
