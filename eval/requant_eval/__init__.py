"""requant_eval: scores language models on token windows and compares them.

Imports nothing of requant and knows neither recipes nor quantization: it judges checkpoints by their scores alone.
"""
