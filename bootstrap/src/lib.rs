//! main_service: gives jobs their queues and nodes, and keeps the books.
//!
//! A [`service::MainService`] remembers nothing between two requests. Each loads `cluster/state`
//! (the [`ledger`]), changes it, lets the pure function [`plan::plan`] decide what follows, writes
//! all of it back in one compare-and-swap, and only then acts. What is to be done stands in the
//! state as [`state::Errand`]s until it is known to be done, so that whoever comes next finishes
//! what a crash left over. [`provider::NodeProvider`] is the seam to the machines.

mod errands;
pub mod ledger;
pub mod names;
pub mod plan;
pub mod provider;
pub mod service;
pub mod spec;
pub mod state;
#[cfg(test)]
mod testing;
