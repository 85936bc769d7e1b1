"""The xpu platform for makeready."""
