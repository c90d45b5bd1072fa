"""A third party's proposers, verifier and observer, each as small as it can be."""
