//! The one integration binary: every test but those beside the code.

mod allocations;
mod controller;
mod references;
