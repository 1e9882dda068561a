//! `/openapi.json`: the interface in a form that programs read, made from the table of paths.

use axum::Json;
use axum::response::{IntoResponse, Response};
use utoipa::PartialSchema;
use utoipa::openapi::path::{
    HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn, PathItem,
};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{AllOfBuilder, ObjectBuilder, SchemaType, Type};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, InfoBuilder, Object, OpenApi, OpenApiBuilder, PathsBuilder,
    Ref, RefOr, Required, ResponseBuilder, Schema,
};

use super::fields::{Fields, ResponseFormat, StreamOptions};
use super::hae::HaeFields;
use super::routes::{Answer, ROUTES, Route};

/// `GET /openapi.json`
pub(super) async fn document() -> Response {
    Json(openapi()).into_response()
}

/// The whole of it.
pub(super) fn openapi() -> OpenApi {
    let mut paths = PathsBuilder::new();
    for route in ROUTES {
        for path in route.paths {
            paths = paths.path(*path, item(route, path));
        }
    }
    let shared = ComponentsBuilder::new()
        .schema("Failure", failure())
        .schema("Fields", Fields::schema())
        .schema("HaeFields", HaeFields::schema())
        .schema("StreamOptions", StreamOptions::schema())
        .schema("ResponseFormat", ResponseFormat::schema());
    let info = InfoBuilder::new()
        .title("hae serve")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some(
            "OpenAI's paths and those of llama.cpp's server. Answers say in `hae` what their cache did.",
        ));
    OpenApiBuilder::new()
        .info(info.build())
        .paths(paths.build())
        .components(Some(shared.build()))
        .build()
}

fn item(route: &Route, path: &str) -> PathItem {
    let (kind, answered) = answer(&route.answer);
    let content = ContentBuilder::new().schema(Some(answered)).build();
    let mut ok = ResponseBuilder::new()
        .description("The answer")
        .content(kind, content);
    if route.body.as_ref().is_some_and(|(_, asks)| *asks) {
        ok = ok.content("text/event-stream", ContentBuilder::new().build());
    }
    let failure = Ref::from_schema_name("Failure");
    let content = ContentBuilder::new().schema(Some(failure)).build();
    let wrong = ResponseBuilder::new()
        .description("Why there is none")
        .content("application/json", content)
        .build();
    let mut operation = OperationBuilder::new()
        .summary(Some(route.summary))
        .response("200", ok.build())
        .response("default", wrong);
    if path.contains("{id}") {
        operation = operation.parameter(parameter("id", "The slot", ParameterIn::Path));
    }
    for (name, what) in route.query {
        operation = operation.parameter(parameter(name, what, ParameterIn::Query));
    }
    if let Some((schema, asks)) = route.body {
        let schema = match asks {
            true => both(schema()),
            false => schema(),
        };
        let content = ContentBuilder::new().schema(Some(schema)).build();
        let body = RequestBodyBuilder::new().content("application/json", content);
        operation = operation.request_body(Some(body.build()));
    }
    PathItem::new(method(&route.method), operation)
}

/// The type of an answer and what is in it.
fn answer(answer: &Answer) -> (&'static str, RefOr<Schema>) {
    let json = "application/json";
    match answer {
        Answer::Object(fields) => (json, object(fields)),
        Answer::List => (json, of(Type::Array)),
        Answer::Any => (json, RefOr::T(Schema::Object(any()))),
        Answer::Text => ("text/plain", of(Type::String)),
    }
}

fn any() -> Object {
    ObjectBuilder::new()
        .schema_type(SchemaType::AnyValue)
        .build()
}

fn of(kind: Type) -> RefOr<Schema> {
    let schema = ObjectBuilder::new().schema_type(SchemaType::Type(kind));
    RefOr::T(Schema::Object(schema.build()))
}

/// An object that has these fields.
fn object(fields: &[(&str, Type)]) -> RefOr<Schema> {
    let mut object = ObjectBuilder::new();
    for (name, kind) in fields {
        object = object.property(*name, of(kind.clone())).required(*name);
    }
    RefOr::T(Schema::Object(object.build()))
}

/// What stands in the place of an answer.
fn failure() -> RefOr<Schema> {
    let error = object(&[
        ("message", Type::String),
        ("type", Type::String),
        ("code", Type::Integer),
    ]);
    let whole = ObjectBuilder::new()
        .property("error", error)
        .required("error");
    RefOr::T(Schema::Object(whole.build()))
}

fn method(method: &HttpMethod) -> HttpMethod {
    match method {
        HttpMethod::Post => HttpMethod::Post,
        _ => HttpMethod::Get,
    }
}

fn both(own: RefOr<Schema>) -> RefOr<Schema> {
    let shared = RefOr::Ref(Ref::from_schema_name("Fields"));
    let all = AllOfBuilder::new().item(own).item(shared).build();
    RefOr::T(Schema::AllOf(all))
}

fn parameter(name: &str, what: &str, place: ParameterIn) -> ParameterBuilder {
    let required = match place {
        ParameterIn::Path => Required::True,
        _ => Required::False,
    };
    let text = ObjectBuilder::new().schema_type(SchemaType::Type(Type::String));
    ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .required(required)
        .description(Some(what))
        .schema(Some(Schema::Object(text.build())))
}
