"""`make bench`: our losses beside what they replace, in one run, each checked against float64 before it is timed.

cases.py says what is measured and on which data, bench_<family>.py who takes part and what we claim, measure.py and
memory.py how, report.py what is printed and kept.
"""
