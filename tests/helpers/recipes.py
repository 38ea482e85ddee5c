"""A recipe of the fewest keys, for tests that read no file it names."""

TEXT = """\
name: x
base: {model: ./base}
adapter: ./adapter
calibration: {data: {path: ./a.txt}}
evaluate:
  sets: [{name: held-out, data: {path: ./b.txt}}]
"""
