"""A small server of OpenAI's protocol for one base model and the adapters of a store.

`batching` generates for many requests at once, `app` speaks HTTP; `loretta serve` puts them together.
"""
