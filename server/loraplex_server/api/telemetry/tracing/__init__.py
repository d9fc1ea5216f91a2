"""Traces of calls and generations, for a collector that speaks OTLP; nothing of prompts and answers."""
