"""The cuda platform for makeready."""
