"""Conversations made into prompts by chat templates, which are programs and run in a process of their own."""
