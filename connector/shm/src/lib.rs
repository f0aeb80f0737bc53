//! connector/shm
