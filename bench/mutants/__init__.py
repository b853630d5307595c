"""Does a unit test fail where the code is wrong? See ``__main__.py``."""
