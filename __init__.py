"""The layer between LLM inference engines and the hardware."""
