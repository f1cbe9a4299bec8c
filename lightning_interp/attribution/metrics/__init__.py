"""Is a map any good?"""
