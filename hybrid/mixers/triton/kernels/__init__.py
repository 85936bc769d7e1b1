"""Device code. Pointers come with all strides; sizes that shape a program are constexprs."""
