"""requant_eval: scores language models on token windows and compares them.

Knows neither recipes nor quantization: the judge does not know the accused.
"""
