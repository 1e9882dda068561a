//! Pictures to embeddings, through mtmd: whatever vision model mtmd knows.

use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use llama_cpp_sys_2 as sys;

use super::gguf::{Gguf, c_path};
use super::{Model, hparams, log, memory, weights};
use crate::cache::Pos;
use crate::engine::Token;
use crate::error::{Error, Result};
use crate::image::{Picture, hd};

/// What makes a picture need less memory.
const SMALLER: &str = "a smaller picture, or a smaller `num_crops` to Phi-3.5-vision";

/// How to load a vision file.
#[derive(Clone, Copy, Debug)]
pub struct VisionOptions {
    /// Whether pictures are encoded on a GPU, where there is one.
    pub use_gpu: bool,
    /// Threads that encode.
    pub n_threads: i32,
}

/// On the GPU, if there is one; otherwise with the threads of [`super::ContextOptions`].
impl Default for VisionOptions {
    fn default() -> Self {
        VisionOptions {
            use_gpu: true,
            n_threads: super::ContextOptions::default().n_threads,
        }
    }
}

/// A part of a prompt as the model takes it.
#[derive(Debug)]
pub enum Piece {
    /// Tokens of the text.
    Text(Vec<Token>),
    /// A picture, or a part of one.
    Image(ImageTokens),
}

impl Piece {
    /// Rows that the piece takes in a batch.
    pub fn len(&self) -> usize {
        match self {
            Piece::Text(tokens) => tokens.len(),
            Piece::Image(image) => image.n,
        }
    }

    /// Positions that the piece takes in the sequence.
    pub fn positions(&self) -> usize {
        match self {
            Piece::Text(tokens) => tokens.len(),
            Piece::Image(image) => usize::try_from(image.n_pos).unwrap_or(0),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A part of a prompt before it is tokenized.
#[derive(Clone, Debug)]
pub enum Part<'a> {
    /// Text between pictures.
    Text(String),
    /// A picture.
    Picture(&'a Picture),
}

impl Part<'_> {
    /// Whether it is a text of nothing.
    pub fn is_empty(&self) -> bool {
        matches!(self, Part::Text(text) if text.is_empty())
    }
}

/// A picture that was cut up and normalised, not yet encoded.
#[derive(Debug)]
pub struct ImageTokens {
    /// Owned: freed on drop.
    chunk: NonNull<sys::mtmd_input_chunk>,
    /// Visual tokens.
    pub n: usize,
    /// Positions that the picture takes in the sequence (less than `n` with M-RoPE).
    pub n_pos: Pos,
    /// Those of the tokens that show nothing but separate parts of the picture, ascending; none
    /// where the model's layout is not known.
    pub separators: Vec<u32>,
}

impl ImageTokens {
    pub(super) fn raw(&self) -> *const sys::mtmd_input_chunk {
        self.chunk.as_ptr()
    }
}

impl Drop for ImageTokens {
    fn drop(&mut self) {
        // SAFETY: made by mtmd_input_chunk_copy, freed once.
        unsafe { sys::mtmd_input_chunk_free(self.chunk.as_ptr()) }
    }
}

/// A picture as the decoder takes it.
#[derive(Clone, Debug)]
pub struct ImageEmbeddings {
    /// Row-major `[n, n_embd]`.
    pub data: Vec<f32>,
    /// Rows.
    pub n: usize,
    /// Positions that they take: not the number of rows where pictures have two axes.
    pub n_pos: Pos,
    /// Only with M-RoPE.
    pub mrope: Option<Mrope>,
    /// As [`ImageTokens::separators`].
    pub separators: Vec<u32>,
}

/// Positions of a picture at the start of a sequence, on all axes.
#[derive(Clone, Debug)]
pub struct Mrope {
    /// `[t, y, x, z]` of each row: `[n]`.
    pub rows: Vec<[Pos; 4]>,
    /// The axes that move with the picture's place in the sequence.
    pub moves: [bool; 4],
}

/// A loaded vision file (`--mmproj`).
pub struct Vision {
    ctx: NonNull<sys::mtmd_context>,
    model: Model,
    path: PathBuf,
    projector: String,
    /// How Phi-3.5-vision's pictures are cut.
    cut: Option<hd::Cut>,
}

// SAFETY: an mtmd context is bound to no thread, and is reached through `Self` alone, which is not
// `Sync`.
unsafe impl Send for Vision {}

impl Drop for Vision {
    fn drop(&mut self) {
        // SAFETY: made by mtmd_init_from_file, freed once.
        unsafe { sys::mtmd_free(self.ctx.as_ptr()) }
    }
}

/// Owned by the caller of `mtmd_bitmap_init`.
struct Bitmap(NonNull<sys::mtmd_bitmap>);

impl Drop for Bitmap {
    fn drop(&mut self) {
        // SAFETY: made by mtmd_bitmap_init, freed once.
        unsafe { sys::mtmd_bitmap_free(self.0.as_ptr()) }
    }
}

/// What a [`sys::mtmd_input_part`] points to. A text's bytes are the caller's.
enum Input {
    Text(sys::mtmd_input_text),
    Picture(Bitmap),
}

impl Input {
    fn raw(&self) -> sys::mtmd_input_part {
        let (text, bitmap) = match self {
            Input::Text(text) => (std::ptr::from_ref(text), std::ptr::null()),
            Input::Picture(bitmap) => (std::ptr::null(), bitmap.0.as_ptr().cast_const()),
        };
        sys::mtmd_input_part { text, bitmap }
    }
}

/// Owned by the caller of `mtmd_input_chunks_init`.
struct Chunks(NonNull<sys::mtmd_input_chunks>);

impl Drop for Chunks {
    fn drop(&mut self) {
        // SAFETY: made by mtmd_input_chunks_init, freed once.
        unsafe { sys::mtmd_input_chunks_free(self.0.as_ptr()) }
    }
}

impl Vision {
    /// Crops that a picture may be cut into at most: what our part of mtmd makes room for.
    pub const MAX_CROPS: u32 = 64;

    /// Loads a vision file for `model`.
    ///
    /// # Errors
    /// [`Error::File`] when the file is not a vision file, or not one for this model.
    pub fn load(path: &Path, model: &Model, options: &VisionOptions) -> Result<Self> {
        let meta = Gguf::open(path)?;
        let arch = meta.text("general.architecture")?;
        if arch != "clip" {
            return Err(Error::file(
                path,
                format!(
                    "is a text model (architecture {arch}), expected a vision file: pass it as `model`"
                ),
            ));
        }
        let projector = meta
            .text("clip.projector_type")
            .or_else(|e| meta.text("clip.vision.projector_type").map_err(|_| e))?;
        hparams::check_vision(&meta)?;
        weights::check(&meta)?;
        let c_path = c_path(path)?;
        let placement = &model.options().placement;
        let device = placement.first()?;
        let use_gpu = options.use_gpu && placement.offloads()?;
        log::forget();
        // SAFETY: the path outlives the call; `Self` owns a clone of the model; a device of the registry or none.
        let ctx = unsafe {
            let mut params = sys::mtmd_context_params_default();
            params.use_gpu = use_gpu;
            params.device = device.unwrap_or(std::ptr::null_mut());
            params.n_threads = options.n_threads;
            params.print_timings = false;
            params.warmup = false;
            let init = match model.options().measure {
                true => sys::mtmd_hae_init_no_alloc,
                false => sys::mtmd_init_from_file,
            };
            init(c_path.as_ptr(), model.inner.as_ptr(), params)
        };
        let ctx = NonNull::new(ctx).ok_or_else(|| {
            Error::file(
                path,
                format!("cannot be loaded: {}", log::take_reason("unknown reason")),
            )
        })?;
        let vision = Vision {
            ctx,
            model: model.clone(),
            path: path.to_owned(),
            cut: (projector == "phi3v").then(|| cut(&meta)).flatten(),
            projector,
        };
        // SAFETY: the context is alive.
        if !unsafe { sys::mtmd_support_vision(vision.ctx.as_ptr()) } {
            return Err(Error::file(path, "holds no vision encoder"));
        }
        Ok(vision)
    }

    pub(super) fn raw(&mut self) -> *mut sys::mtmd_context {
        self.ctx.as_ptr()
    }

    /// The vision file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The projector's name in mtmd (`phi3v`, `mlp`, `gemma3`, ...).
    pub fn projector(&self) -> &str {
        &self.projector
    }

    /// Whether every text between pictures starts with its own BOS (Phi-3.5-vision's processor).
    pub fn bos_per_text(&self) -> bool {
        self.projector == "phi3v"
    }

    /// Checks [`Picture::num_crops`].
    ///
    /// # Errors
    /// [`Error::Option`] when this vision model is cut up in other ways, or the number is not in
    /// `1..=MAX_CROPS`.
    pub fn check_num_crops(&self, n: u32) -> Result<()> {
        if self.projector != "phi3v" {
            let reason = format!(
                "only Phi-3.5-vision takes a number of crops, this is {}",
                self.projector
            );
            return Err(Error::option("num_crops", reason));
        }
        if !(1..=Self::MAX_CROPS).contains(&n) {
            let reason = format!("{n}, expected 1 to {}", Self::MAX_CROPS);
            return Err(Error::option("num_crops", reason));
        }
        Ok(())
    }

    /// How a picture's tokens lie on it, where that is known.
    pub fn hd_layout(&self, picture: &Picture) -> Option<hd::Layout> {
        let mut cut = self.cut?;
        cut.max_crops = picture.num_crops.unwrap_or(cut.max_crops);
        Some(hd::Layout {
            width: picture.width,
            height: picture.height,
            cut,
        })
    }

    /// Whether a picture's tokens attend to all of the picture.
    pub fn non_causal(&self) -> bool {
        // SAFETY: the context is alive; null means "an image chunk".
        unsafe { sys::mtmd_decode_use_non_causal(self.ctx.as_ptr(), std::ptr::null()) }
    }

    /// Tokens of texts and pictures as they follow one another. Texts are texts, whatever they look
    /// like; special tokens in them are parsed.
    ///
    /// # Errors
    /// Those of [`Self::check_num_crops`]; [`Error::Option`] for a text with a NUL byte;
    /// [`Error::Llama`] when a picture cannot be cut up.
    pub fn tokenize(&self, parts: &[Part<'_>], add_bos: bool) -> Result<Vec<Piece>> {
        let given = parts.iter().filter(|part| !part.is_empty());
        let inputs = given
            .map(|part| self.input(part))
            .collect::<Result<Vec<_>>>()?;
        let raw: Vec<sys::mtmd_input_part> = inputs.iter().map(Input::raw).collect();
        let pointers: Vec<*const sys::mtmd_input_part> =
            raw.iter().map(std::ptr::from_ref).collect();
        // SAFETY: takes nothing.
        let chunks = Chunks(
            NonNull::new(unsafe { sys::mtmd_input_chunks_init() })
                .ok_or_else(|| Error::llama("mtmd_input_chunks_init", "out of memory"))?,
        );
        log::forget();
        // SAFETY: context and chunks are alive. `pointers` leads to parts that point to texts, given
        // with their lengths, and to bitmaps; `parts`, `inputs` and `raw` own these and outlive the call,
        // which keeps no pointer. The function catches what C++ throws.
        let status = unsafe {
            sys::mtmd_tokenize_from_parts(
                self.ctx.as_ptr(),
                chunks.0.as_ptr(),
                pointers.as_ptr().cast_mut(),
                pointers.len(),
                add_bos,
            )
        };
        if status != 0 {
            let reason = log::take_reason(&format!("status {status}"));
            return Err(Error::llama(
                "mtmd_tokenize_from_parts",
                memory::explained(reason, "cutting up a picture", SMALLER),
            ));
        }
        // SAFETY: the chunks are alive.
        let n = unsafe { sys::mtmd_input_chunks_size(chunks.0.as_ptr()) };
        let pieces = (0..n).map(|i| self.piece(&chunks, i));
        let mut pieces = pieces.collect::<Result<Vec<_>>>()?;
        if self.cut.is_some() {
            // Where the layout is known, a picture is one piece.
            let images = pieces.iter_mut().filter_map(|piece| match piece {
                Piece::Image(tokens) => Some(tokens),
                Piece::Text(_) => None,
            });
            let pictures = parts.iter().filter_map(|part| match part {
                Part::Picture(picture) => Some(picture),
                Part::Text(_) => None,
            });
            for (tokens, picture) in images.zip(pictures) {
                let layout = self.hd_layout(picture);
                tokens.separators = layout.map_or(Vec::new(), |layout| layout.separators(tokens.n));
            }
        }
        Ok(pieces)
    }

    fn input(&self, part: &Part<'_>) -> Result<Input> {
        match part {
            Part::Text(text) if text.contains('\0') => Err(Error::option(
                "prompt_text",
                "the prompt contains a NUL byte",
            )),
            Part::Text(text) => Ok(Input::Text(sys::mtmd_input_text {
                text: text.as_ptr().cast(),
                text_len: text.len(),
                // Ignored where parts are given.
                add_special: false,
                parse_special: true,
            })),
            Part::Picture(picture) => {
                if let Some(n) = picture.num_crops {
                    self.check_num_crops(n)?;
                }
                Ok(Input::Picture(bitmap(picture)?))
            }
        }
    }

    fn piece(&self, chunks: &Chunks, i: usize) -> Result<Piece> {
        // SAFETY: i is below the number of chunks; the chunk lives as long as `chunks`, the text
        // tokens as long as the chunk.
        unsafe {
            let chunk = sys::mtmd_input_chunks_get(chunks.0.as_ptr(), i);
            match sys::mtmd_input_chunk_get_type(chunk) {
                sys::MTMD_INPUT_CHUNK_TYPE_TEXT => {
                    let mut n = 0;
                    let tokens = sys::mtmd_input_chunk_get_tokens_text(chunk, &raw mut n);
                    let tokens = if n == 0 {
                        &[]
                    } else {
                        std::slice::from_raw_parts(tokens, n)
                    };
                    Ok(Piece::Text(tokens.to_vec()))
                }
                sys::MTMD_INPUT_CHUNK_TYPE_IMAGE => {
                    let copy = NonNull::new(sys::mtmd_input_chunk_copy(chunk))
                        .ok_or_else(|| Error::llama("mtmd_input_chunk_copy", "out of memory"))?;
                    Ok(Piece::Image(ImageTokens {
                        chunk: copy,
                        n: sys::mtmd_input_chunk_get_n_tokens(chunk),
                        n_pos: sys::mtmd_input_chunk_get_n_pos(chunk),
                        separators: Vec::new(),
                    }))
                }
                other => Err(Error::llama(
                    "mtmd_tokenize",
                    format!("chunk type {other}, expected text or image"),
                )),
            }
        }
    }

    /// Runs the vision tower and the projector on one picture.
    ///
    /// # Errors
    /// [`Error::Llama`] when the encoder fails.
    pub fn encode(&mut self, image: &ImageTokens) -> Result<ImageEmbeddings> {
        if self.model.options().measure {
            return Err(Error::contract(
                "a vision file that was loaded to be measured",
            ));
        }
        log::forget();
        // SAFETY: context and chunk are alive.
        let status = unsafe { sys::mtmd_encode_chunk(self.ctx.as_ptr(), image.chunk.as_ptr()) };
        let what = format!("encoding a picture of {} tokens", image.n);
        if status != 0 {
            let reason = log::take_reason(&format!("status {status}"));
            return Err(Error::llama(
                "mtmd_encode_chunk",
                memory::explained(reason, &what, SMALLER),
            ));
        }
        let len = image.n * self.model.n_embd();
        let mut data = Vec::new();
        memory::reserve(&mut data, len, "mtmd_get_output_embd", &what, SMALLER)?;
        // SAFETY: after a successful encode the output holds n_tokens * n_embd floats, until the
        // next encode; they are copied at once.
        unsafe {
            let output = sys::mtmd_get_output_embd(self.ctx.as_ptr());
            if output.is_null() {
                return Err(Error::llama("mtmd_get_output_embd", "no embeddings"));
            }
            data.extend_from_slice(std::slice::from_raw_parts(output, len));
        }
        Ok(ImageEmbeddings {
            data,
            n: image.n,
            n_pos: image.n_pos,
            mrope: self.mrope(image),
            separators: image.separators.clone(),
        })
    }

    fn mrope(&self, image: &ImageTokens) -> Option<Mrope> {
        // SAFETY: the context is alive.
        if !unsafe { sys::mtmd_decode_use_mrope(self.ctx.as_ptr()) } {
            return None;
        }
        let at = |base, i| {
            // SAFETY: the chunk is alive and an image; i is below its number of tokens.
            let p = unsafe {
                let tokens = sys::mtmd_input_chunk_get_tokens_image(image.chunk.as_ptr());
                sys::mtmd_image_tokens_get_decoder_pos(tokens, base, i)
            };
            [p.t as Pos, p.y as Pos, p.x as Pos, p.z as Pos]
        };
        // Some models count an axis from the picture's place in the sequence, others from 0.
        let (here, further) = (at(0, 0), at(1, 0));
        Some(Mrope {
            rows: (0..image.n).map(|i| at(0, i)).collect(),
            moves: std::array::from_fn(|axis| here[axis] != further[axis]),
        })
    }
}

/// The sizes that mtmd has checked.
fn cut(meta: &Gguf) -> Option<hd::Cut> {
    let number = |key: &str| {
        let value = meta.unsigned(&format!("clip.vision.{key}")).ok()?;
        u32::try_from(value).ok()
    };
    let side = number("image_size")?;
    let patch = number("patch_size")?.checked_mul(number("spatial_merge_size")?)?;
    Some(hd::Cut {
        side,
        tokens: side.checked_div(patch)?,
        max_crops: number("preproc_max_tiles")?,
    })
}

fn bitmap(picture: &Picture) -> Result<Bitmap> {
    let expected = (picture.width as usize)
        .checked_mul(picture.height as usize)
        .and_then(|n| n.checked_mul(3));
    if expected != Some(picture.rgb.len()) {
        return Err(Error::llama(
            "mtmd_bitmap_init",
            format!(
                "{} bytes for {}x{} pixels",
                picture.rgb.len(),
                picture.width,
                picture.height
            ),
        ));
    }
    // SAFETY: the data holds width * height * 3 bytes, which the call copies.
    let bitmap = NonNull::new(unsafe {
        sys::mtmd_bitmap_init(picture.width, picture.height, picture.rgb.as_ptr())
    })
    .map(Bitmap)
    .ok_or_else(|| {
        let reason = memory::explained("no memory".to_owned(), "a picture", SMALLER);
        Error::llama("mtmd_bitmap_init", reason)
    })?;
    if let Some(n) = picture.num_crops {
        // SAFETY: the bitmap is alive; mtmd checks the number when it cuts the picture.
        unsafe { sys::mtmd_bitmap_set_max_tiles(bitmap.0.as_ptr(), n.try_into().unwrap_or(-1)) }
    }
    Ok(bitmap)
}
