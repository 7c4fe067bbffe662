"""The index of a repository, the search in it, and the service around both."""
