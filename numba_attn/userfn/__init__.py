"""What a user's scalar function means: which functions are accepted, the types that they compute with on each target,
and their derivatives."""
