"""What a server imports until it is ready, for the process that tests/processes.py forks."""

from app.cli.importing import large_imports

with large_imports():
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    import app.cli
    import app.server.process

__all__ = ["AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "app"]
