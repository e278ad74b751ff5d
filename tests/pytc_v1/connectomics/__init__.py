"""A stand-in for pytorch_connectomics v1: what our plugin calls and is called by, with PyTC's signatures, and no more.

The tests of the plugin run against it where PyTC is not installed. Where it is, they run against PyTC itself, and
``test_the_stand_in_has_the_signatures_of_the_host`` holds this package to it.
"""
