//! What the loop over the slots needs of a model. A test can do without one.

use std::path::Path;

use super::units::{Held, Piece};
use crate::attend::Attend;
use crate::cache::{BinOptions, Cell};
use crate::controller::Controller;
use crate::engine::{Engine, Sampler};
use crate::error::Result;
use crate::generate::{Segment, Slot};
use crate::image::hd::Layout;
use crate::llama::SamplerOptions;
use crate::policy::PolicySpec;
use crate::serve::ask::Part;

/// A model, its context and its eyes.
pub(super) trait Mind {
    /// The context.
    type Engine: Engine;
    /// A picture that was cut up, and is to be encoded.
    type Picture;
    /// A conversation out of a file.
    type Saved;

    /// The context, whose cache all slots share.
    fn engine(&mut self) -> &mut Self::Engine;

    /// The same, to look at.
    fn look(&self) -> &Self::Engine;

    /// Reads a prompt. What follows it is checked here as far as it can be: tokens, pictures.
    ///
    /// # Errors
    /// [`crate::Error::Option`] for what cannot be read.
    fn read(&self, prompt: &[Part]) -> Result<Vec<Piece<Self::Picture>>>;

    /// Encodes a picture, as number 0.
    ///
    /// # Errors
    /// The encoder's own.
    fn encode(&mut self, picture: &Self::Picture) -> Result<Segment>;

    /// Books of a conversation under a policy.
    ///
    /// # Errors
    /// [`crate::Error::Option`] or [`crate::Error::Unsupported`] for one that this context cannot serve.
    fn controller(&self, policy: &PolicySpec) -> Result<Controller>;

    /// Where rows of evicted tokens wait.
    fn bin(&self) -> BinOptions;

    /// Refuses what steps of this context do not attend to.
    ///
    /// # Errors
    /// [`crate::Error::Option`].
    fn check_attend(&self, attend: &Attend) -> Result<()>;

    /// Chooses tokens in this way.
    fn sampler(&self, options: &SamplerOptions) -> Box<dyn Sampler>;

    /// Positions that the rope factors reach, where they end before the cache does.
    fn reach(&self) -> Option<usize> {
        None
    }

    /// How the patches of the pictures of a prompt lie on them, in order; `None` where that is not known.
    fn layouts(&self, _prompt: &[Part]) -> Vec<Option<Layout>> {
        Vec::new()
    }

    /// Cells that a layer chose in the last batch, ascending, where layers choose and it is kept what.
    fn looked_up(&mut self) -> Vec<Cell> {
        Vec::new()
    }

    /// Writes what a slot holds to a file, and gives its bytes.
    ///
    /// # Errors
    /// Those of [`crate::saved`].
    fn save(&mut self, slot: &mut Slot<'static>, held: &Held, file: &Path) -> Result<u64>;

    /// Reads such a file. Gives the cells that its conversation takes, and its bytes.
    ///
    /// # Errors
    /// Those of [`crate::saved`].
    fn open(&self, file: &Path) -> Result<(Self::Saved, usize, u64)>;

    /// Lets an empty slot hold it.
    ///
    /// # Errors
    /// As [`Mind::open`]. The slot has to be cleared then.
    fn restore(&mut self, slot: &mut Slot<'static>, saved: Self::Saved) -> Result<Held>;
}
