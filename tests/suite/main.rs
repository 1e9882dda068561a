//! The one integration binary: every test but those beside the code.

mod allocations;
mod controller;
mod ddes;
mod random;
mod references;
