"""The door to names that PEFT and torch keep private: nothing outside uses them, so a new release is read here only.

Each file says in which version its names were read. A release in which one of them means something else shows in the
tests of what is built on it, and is mended in one place.
"""
