"""Attention as conditioning: keys and values as stimuli that are associated, queries as tests of what was learned."""
