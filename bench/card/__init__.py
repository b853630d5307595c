"""The report card: every results file under ``bench/results`` as one HTML page and one picture.

``python -m bench.card`` writes both. A section shows one file, that is one machine at one commit:
figures of different machines never meet in a ratio, a plot or a table.
"""
