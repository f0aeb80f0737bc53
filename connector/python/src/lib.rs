//! connector/python
