"""Block-size constraints: values with an owner. One solver takes them all (see solver below)."""
